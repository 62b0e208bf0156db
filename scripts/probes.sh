#!/usr/bin/env bash
# The effect of the weight of log p(x): two epochs of WRN-10-2 on CIFAR-10 with weights 1, 0.3, 0.1
# and 0, in bfloat16, with the settings of the published cifar10_wrn10_2 (results/models). About 10
# minutes a weight and seed on one CPU core.
source "$(dirname "$0")/common.sh"

PROBE=(--n_steps 5 --labelled_batch 128 --schedule linear --nesterov --weight_decay 0.0005 --clean_p_x
       --alternating_flip --recalibrate_bn 5000 --ema 0.99 --eval_every 2 --amp bf16 --fast)
[ "$SCALE" = tiny ] ||
    SIZE=(--depth 10 --width 2 --batch_size 32 --n_epochs 2 --warmup_iters 100)
for W in 1 0.3 0.1 0; do
    row probes "p_x_weight $W" "probe-w$W" "${PROBE[@]}" --p_x_weight $W \
        -- --eval calibration accuracy
done
