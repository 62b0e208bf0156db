#!/usr/bin/env bash
# A JEM of CIFAR-10 from CPU cores in a night or two, with its softmax twin: WRN-16-4 with a stem of
# stride 2, 40 epochs, each run on one core. MODEL says which (hours: estimates at 50 GFLOP/s a core):
#   hybrid  (default) M = 5, log p(x) in the last 24 epochs with weight 0.3, 1.9 PFLOP: 11 hours
#   twin    the same network as a classifier alone, 1.1 PFLOP: 6 hours
#   paper   the paper's own objective: log p(x) from the start with weight 1, 2.5 PFLOP: 14 hours
#   judge   a softmax WRN-16-2 with the usual stem, for --features of eval_jempp.py, 0.55 PFLOP: 3 hours
# DATA: folder of the data sets (downloaded there if missing). RUN: output folder. Flags are passed to
# train_jempp.py. The same command goes on, so --max_minutes 150 makes sittings of it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

MODEL=${MODEL:-hybrid}
CHAINS=(--n_steps 5 --batch_size 32 --buffer_size 2000 --lr 0.1 --rollback_lr_factor 0.5)
case $MODEL in
    hybrid) FLAGS=("${CHAINS[@]}" --p_x_weight 0.3 --p_x_from 16) ;;
    paper)  FLAGS=("${CHAINS[@]}") ;;
    twin)   FLAGS=(--p_x_weight 0 --batch_size 128 --lr 0.2) ;;
    judge)  FLAGS=(--p_x_weight 0 --batch_size 128 --lr 0.2 --width 2 --stem_stride 1 --n_epochs 20) ;;
    *) echo "MODEL is hybrid, twin, paper or judge, not $MODEL" >&2; exit 2 ;;
esac
exec python train_jempp.py --data_root "${DATA:-data}" --run_dir "${RUN:-runs/cpu-$MODEL}" \
    --depth 16 --width 4 --stride_first --stem_stride 2 --labelled_batch 128 --n_epochs 40 \
    --schedule linear --warmup_iters 500 --nesterov --weight_decay 0.0005 --alternating_flip \
    --recalibrate_bn 5000 --num_threads 1 --fast --print_every 50 --eval_every 2 --ckpt_steps 200 \
    "${FLAGS[@]}" "$@"
