#!/usr/bin/env bash
# The paper's main run (Table 2, JEM++ M=10): CIFAR-10, WRN-28-10, batch norm, PYLD-10-5, SGD 0.1,
# 150 epochs of 703 iterations. Paper: 93.5 % accuracy, FID 37.1, 20 minutes an epoch on an RTX card
# (50 hours). One modern data-centre GPU needs much less. Running it again continues a stopped run.
# DATA: folder of the data sets (downloaded there if missing). RUN: output folder.
# Flags are passed to train_jempp.py, as in: bash scripts/train_cifar10.sh --n_steps 5
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

exec python train_jempp.py --data_root "${DATA:-data}" --run_dir "${RUN:-runs/cifar10_m10}" \
    --dataset cifar10 --depth 28 --width 10 --norm batch --n_steps 10 --in_steps 5 "$@"
