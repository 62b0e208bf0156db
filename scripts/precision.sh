#!/usr/bin/env bash
# Compares bfloat16 inside the network with float32, over ten epochs of a small network and three
# seeds: do accuracy and energy gap end within the spread over seeds? Minutes on a CPU with digits:
#   SCALE=tiny OUT=results N_IMAGES=360 bash scripts/precision.sh --n_train 1300 --batch_size 32 \
#       --warmup_iters 40 --buffer_size 1000 --print_every 20 --no-stride_first --stem_stride 1
SEEDS=${SEEDS:-1 2 3}
source "$(dirname "$0")/common.sh"

TEN=(--n_steps 5 --amp)
CAL=(--eval accuracy calibration ${N_IMAGES:+--n_images "$N_IMAGES"})
WORDS+=(--n_epochs 10 --decay_epochs 7)
row precision float32 precision-float32 "${TEN[@]}" off -- "${CAL[@]}"
row precision bf16 precision-bf16 "${TEN[@]}" bf16 -- "${CAL[@]}"
