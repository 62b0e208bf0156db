#!/usr/bin/env bash
# What a short run on CPU cores should look like: one thing changed at a time. PARTS says what to run:
#   softmax     the classifier alone, 5 epochs: rate, noise, shift
#   joint       log p(x), two epochs from the first softmax network: rate, weight, |B|, ramp, M, chains
#   whole       WRN-16-2 with a stem of stride 2: log p(x) from the start, and in two stages
#   statistics  the running statistics of batch norm, one epoch from that network (SEEDS="1 2 3")
# WRN-10-1 takes 5 to 20 minutes a row on one CPU core. --depth 16 --width 2 repeats it larger (in other
# RUNS and OUT).
PARTS=${PARTS:-softmax joint whole statistics}
source "$(dirname "$0")/common.sh"

RATE=(--schedule linear --nesterov --weight_decay 0.0005 --alternating_flip)
if [ "$SCALE" != paper ]; then echo "probes.sh has a size of its own: leave SCALE out" >&2; exit 2; fi
SIZE=(--depth 10 --width 1 --num_threads 1 --print_every 50 --eval_every 10)
EVAL+=(--ood cifar100 "svhn=folder:$DATA/svhn-test-10000" --n_attack 300 --attack_restarts 2)
EVAL+=(--eps_linf 2 --eps_l2)
CLASS=("${SOFTMAX[@]}" --batch_size 128 --lr 0.1 --n_epochs 5 --warmup_iters 200 --recalibrate_bn 5000)
JOINT=(--n_steps 5 --batch_size 32 --labelled_batch 128)
STAGE=("${JOINT[@]}" --warmup_iters 50 --load_path "$RUNS/probe-softmax-seed1/last.pt")
TWO=("${STAGE[@]}" --p_x_weight 0.3 --lr 0.02 --buffer_size 500 --n_epochs 2 --recalibrate_bn 5000)
ONE=("${STAGE[@]}" --p_x_weight 0.3 --lr 0.02 --buffer_size 500 --n_epochs 1)
WHOLE=("${JOINT[@]}" --p_x_weight 0.3 --lr 0.05 --buffer_size 2000 --warmup_iters 200 --recalibrate_bn 5000)
CAL=(--eval accuracy calibration)
ALL=(--eval accuracy calibration ood robustness --attacks margin)

# PART "what changed" run-name flags...
classifier() { row probes "softmax: $1" "probe-softmax$2" "${CLASS[@]}" "${RATE[@]}" "${@:3}" -- "${CAL[@]}"; }
joint() { row probes "joint stage: $1" "probe-joint-$2" "${TWO[@]}" "${RATE[@]}" "${@:3}" -- "${ALL[@]}"; }
whole() {  # on the network of SCALE=cpu
    local SIZE=("${SIZE[@]}" --depth 16 --width 2 --stride_first --stem_stride 2)
    row probes "whole run: $1" "probe-$2" "${WHOLE[@]}" "${RATE[@]}" "${@:3}" -- "${ALL[@]}"
}
stats() {  # measured as the run leaves them and measured anew
    RECALIBRATE=5000 row probes "statistics: $1" "probe-stats-$2" "${ONE[@]}" "${RATE[@]}" "${@:3}" -- "${CAL[@]}"
}

if [[ $PARTS = *softmax* ]]; then
    classifier "rate 0.1" ""
    classifier "rate 0.2" -lr2 --lr 0.2
    classifier "rate 0.4" -lr4 --lr 0.4
    classifier "no noise" -sigma0 --sigma 0
    classifier "shift 2" -pad2 --pad 2
fi
if [[ $PARTS = *joint* ]]; then
    joint "weight 0.3, rate 0.02, B 500" base
    joint "B 10,000" b10000 --buffer_size 10000
    joint "rate 0.05" lr5 --lr 0.05
    joint "weight 0.1" w1 --p_x_weight 0.1
    joint "weight 1" w10 --p_x_weight 1
    joint "ramp over 300 steps" ramp --p_x_ramp 300
    joint "M = 10" m10 --n_steps 10
    joint "64 chains" c64 --buffer_size 1000 --batch_size 64
fi
if [[ $PARTS = *whole* ]]; then
    whole "softmax, rate 0.2" strided-softmax "${CLASS[@]}" --lr 0.2
    whole "from the start, weight 0.3" start --n_epochs 4
    whole "two stages, log p(x) in the last 3 of 5 epochs" stages --n_epochs 5 --p_x_from 2
    whole "two stages, log p(x) in the last of 2 epochs" stages-short --n_epochs 2 --p_x_from 1 --buffer_size 500
fi
if [[ $PARTS = *statistics* ]]; then
    stats "momentum 0.9" m9
    stats "momentum 0.1" m1 --bn_momentum 0.1
    stats "momentum 0.9, bn_update real" m9-real --bn_update real
    stats "momentum 0.1, bn_update real" m1-real --bn_momentum 0.1 --bn_update real
fi
