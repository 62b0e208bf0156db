#!/usr/bin/env bash
# Table 3: accuracy on SVHN and CIFAR-100 of the softmax WRN, JEM and JEM++ (M = 5, 10).
# SCALE=paper takes about a day a row and data set on one data-centre GPU. Expect (paper) 96.9 % and
# 74.5 % for M = 10. DATASETS picks the data sets. At SCALE=tiny both are the digits.
source "$(dirname "$0")/common.sh"

[ "$SCALE" != cpu ] || DATASETS=${DATASETS:-cifar100}
CAL=(--eval accuracy calibration)
for NAME in ${DATASETS:-svhn cifar100}; do
    row table3 "Softmax (w/ BN)" "$NAME-softmax" --dataset "$NAME" "${SOFTMAX[@]}" -- "${CAL[@]}"
    [ "$SCALE" = cpu ] ||
        row table3 "JEM (K=20)" "$NAME-jem-k20" --dataset "$NAME" "${JEM[@]}" -- "${CAL[@]}"
    for M in 5 10; do
        row table3 "JEM++ (M=$M)" "$NAME-jempp-m$M" --dataset "$NAME" --n_steps $M -- "${CAL[@]}"
    done
done
