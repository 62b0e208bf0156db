#!/usr/bin/env bash
# Table 7 and the histograms of Table 8: out-of-distribution detection by models trained on CIFAR-10,
# AUROC of log p(x) and max p(y|x). Uses the models of table2.sh and trains missing ones. Out sets are
# SVHN, interpolated CIFAR-10, CIFAR-100, CelebA. Missing ones are reported and left out. Expect
# (paper, M = 10): .63, .68, .64, .59 for log p(x) and .91, .78, .88, .82 for max p(y|x).
source "$(dirname "$0")/common.sh"

OOD=(--eval ood histogram)
row table7 "WideResNet" softmax "${SOFTMAX[@]}" -- "${OOD[@]}"
row table7 "JEM (K=20)" jem-k20 "${JEM[@]}" -- "${OOD[@]}"
[ "$SCALE" = cpu ] || row table7 "IGEBM" igebm "${IGEBM[@]}" -- "${OOD[@]}"
for M in 5 10 20; do
    row table7 "JEM++ (M=$M)" "jempp-m$M" --n_steps $M -- "${OOD[@]}"
done
