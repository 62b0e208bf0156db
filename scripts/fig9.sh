#!/usr/bin/env bash
# Fig. 9: accuracy under white-box PGD (L-inf and L2) of the softmax WRN, JEM, JEM++ and of PGD
# adversarial training with each norm (the top lines). Attacks the first 300 test images, as JEM did,
# with PGD and with a margin attack with restarts. Trains as table2.sh, plus two adversarial rows.
source "$(dirname "$0")/common.sh"

ATTACK=(--eval robustness)
row fig9 "Softmax" softmax "${SOFTMAX[@]}" -- "${ATTACK[@]}"
row fig9 "JEM (K=20)" jem-k20 "${JEM[@]}" -- "${ATTACK[@]}"
for M in 5 10; do
    row fig9 "JEM++ (M=$M)" "jempp-m$M" --n_steps $M -- "${ATTACK[@]}"
done
for NORM in linf l2; do
    row fig9 "Adv. training, $NORM" "adversarial-$NORM" "${SOFTMAX[@]}" --adversarial $NORM \
        -- "${ATTACK[@]}"
done
if ! grep -qs '"robust_accuracy"' "$OUT/fig9.jsonl"; then exit; fi
python scripts/figures.py robustness --records "$OUT/fig9.jsonl" --out "$OUT/figures/fig9_$SCALE"
