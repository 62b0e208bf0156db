#!/usr/bin/env bash
# Trains a small JEM++ in minutes on a CPU, starting from a fresh clone: makes .venv, installs, trains
# a WRN-10-2 on scikit-learn's digits (PYLD-5-5, p(x) and p(y|x) together), evaluates it and writes
# pictures. Running it again continues a stopped run. Flags are passed to train_jempp.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
RUN=${RUN:-runs/quickstart}

python train_jempp.py --dataset digits --depth 10 --width 2 --stride_first --stem_stride 2 --n_steps 5 \
    --buffer_size 1000 --warmup_iters 100 --n_epochs 30 --decay_epochs 18 25 --print_every 20 --run_dir "$RUN" "$@"

python eval_jempp.py --load_path "$RUN/best.pt" --results "$RUN/eval/results.jsonl" --no-download \
    --eval accuracy calibration ood robustness samples best_worst --ood interp uniform constant \
    --eps_linf 4 8 16 --eps_l2 0.5 1 --attack_restarts 2 --chain_steps 100

echo "pictures: $RUN/eval/*.png and $RUN/samples/    curves: tensorboard --logdir $RUN"
