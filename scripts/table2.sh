#!/usr/bin/env bash
# Table 2: CIFAR-10, accuracy, IS and FID of JEM++ (M = 5, 10, 20), JEM, an IGEBM-like model and the
# softmax WRN. Hours on one data-centre GPU at SCALE=paper: about a day a JEM++ row, two for JEM.
# Expect 93.5 % and FID 37 for M = 10 (paper); JEM may diverge (before epoch 60, says the paper) and
# is then recorded so. IS and FID need the Inception weights; fd_features is measured in any case.
source "$(dirname "$0")/common.sh"

features
for M in 5 10 20; do
    row table2 "JEM++ (M=$M)" "jempp-m$M" --n_steps $M -- --eval accuracy "${FID[@]}"
done
row table2 "JEM (K=20)" jem-k20 "${JEM[@]}" -- --eval accuracy "${FID[@]}"
row table2 "IGEBM" igebm "${IGEBM[@]}" -- --eval accuracy "${FID[@]}"
row table2 "WRN w/ BN" softmax "${SOFTMAX[@]}" -- --eval accuracy
