#!/usr/bin/env bash
# A JEM of CIFAR-10 from CPU cores, with its softmax twin: WRN-16-4 with a stem of stride 2, each run on
# one core. MODEL says which. PFLOP are 10^15 counted operations. The hours are for a core with native
# bf16 (measured, 0.33 TFLOP/s) and for one without (estimates, 0.05 TFLOP/s):
#   hybrid  (default) M = 5: 14 epochs as a classifier (MODEL=start), then 24 with log p(x) of weight 0.3
#           and |B| = 500, 1.9 PFLOP: 1.6 hours, or 10
#   twin    the same network as a classifier alone, 40 epochs, 1.1 PFLOP: 0.9 hours, or 6
#   paper   the paper's own objective: log p(x) from the start with weight 1, 20 epochs, 1.2 PFLOP: 1 hour,
#           or 7
#   judge   a softmax WRN-16-2 with the usual stem, for scripts/judge.sh, 0.55 PFLOP: half an hour, or 3
#           (estimates; 1 hour was measured at 0.15 TFLOP/s)
# DATA: folder of the data sets (downloaded there if missing). RUN: output folder. Flags are passed to
# train_jempp.py. The same command goes on, so --max_minutes 150 makes sittings of it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

MODEL=${MODEL:-hybrid} RUN=${RUN:-runs/cpu-${MODEL:-hybrid}}
CHAINS=(--n_steps 5 --batch_size 32 --rollback_lr_factor 0.5)
CLASS=(--p_x_weight 0 --batch_size 128 --n_epochs 40 --warmup_iters 500)
case $MODEL in
    start)  FLAGS=("${CLASS[@]}" --lr 0.1 --max_steps 4914) ;;  # 14 of the 40 epochs
    hybrid) FLAGS=("${CHAINS[@]}" --load_path "$RUN-start/best.pt" --p_x_weight 0.3 --buffer_size 500
                   --n_epochs 24 --warmup_iters 100 --lr 0.03 --max_rollbacks 5) ;;
    twin)   FLAGS=("${CLASS[@]}" --lr 0.2) ;;
    paper)  FLAGS=("${CHAINS[@]}" --buffer_size 2000 --n_epochs 20 --warmup_iters 500 --lr 0.1) ;;
    judge)  FLAGS=("${CLASS[@]}" --lr 0.2 --width 2 --stem_stride 1 --n_epochs 20) ;;
    *) echo "MODEL is hybrid, start, twin, paper or judge, not $MODEL" >&2; exit 2 ;;
esac
if [ "$MODEL" = hybrid ] && ! grep -qs '"step": 4914,.*"reason": "max_steps"' "$RUN-start/train.jsonl"; then
    MODEL=start RUN=$RUN-start bash "$0" "$@"
fi
exec python train_jempp.py --data_root "${DATA:-data}" --run_dir "$RUN" --depth 16 --width 4 \
    --stride_first --stem_stride 2 --labelled_batch 128 --schedule linear --nesterov \
    --weight_decay 0.0005 --alternating_flip --recalibrate_bn 5000 --num_threads 1 --fast \
    --print_every 50 --eval_every 2 --ckpt_steps 200 "${FLAGS[@]}" "$@"
