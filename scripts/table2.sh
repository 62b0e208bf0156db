#!/usr/bin/env bash
# Table 2: accuracy, IS and FID on CIFAR-10 of JEM++ (M = 5, 10, 20), JEM, an IGEBM-like model and the
# softmax WRN. At SCALE=paper a JEM++ row takes about a day on one data-centre GPU, JEM two. Expect
# (paper) 93.5 % and FID 37 for M = 10. JEM may diverge (before epoch 60 in the paper), which is then
# recorded. IS and FID need the Inception weights, fd_features does not.
source "$(dirname "$0")/common.sh"

ALL=(--eval accuracy calibration "${FID[@]}")
for M in 5 10 20; do
    row table2 "JEM++ (M=$M)" "jempp-m$M" --n_steps $M -- "${ALL[@]}"
done
row table2 "JEM (K=20)" jem-k20 "${JEM[@]}" -- "${ALL[@]}"
[ "$SCALE" = cpu ] || row table2 "IGEBM" igebm "${IGEBM[@]}" -- "${ALL[@]}"
row table2 "WRN w/ BN" softmax "${SOFTMAX[@]}" -- --eval accuracy calibration
