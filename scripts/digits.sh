#!/usr/bin/env bash
# The rows of Tables 2 and 5 on digits: a miniature of the paper's whole schedule, with three seeds.
# Measures the last checkpoint: accuracy, calibration, out-of-distribution detection, accuracy under the
# margin attack, fd_features in the softmax network. And of the run: the last energy gap, divergences,
# rollbacks. A row and seed takes 1 to 10 minutes on one CPU core. Records: results/digits/rows.jsonl.
# fd_features compares rows that one softmax network judges: where RUNS is lost, another one is trained.
if [ "${SCALE:-digits}" != digits ]; then echo "digits.sh is SCALE=digits: leave SCALE out" >&2; exit 2; fi
SCALE=digits SEEDS=${SEEDS:-1 2 3}
source "$(dirname "$0")/common.sh"

ATTACK=(--attacks margin --eps_linf 8 16 32 --eps_l2)
ALL=("${ATTACK[@]}" --eval accuracy calibration ood robustness "${FID[@]}")
row rows "WRN w/ BN" softmax "${SOFTMAX[@]}" -- "${ATTACK[@]}" --eval accuracy calibration ood robustness
for M in 5 10 20; do row rows "JEM++ (M=$M)" "jempp-m$M" --n_steps $M -- "${ALL[@]}"; done
row rows "JEM (K=20)" jem-k20 "${JEM[@]}" -- "${ALL[@]}"
row rows "w/o Proximity" no-proximity --eps inf -- "${ALL[@]}"
row rows "w/ Adam" adam --optimizer adam -- "${ALL[@]}"
row rows "random init (w/ BN)" uniform-bn --init uniform -- "${ALL[@]}"
row rows "random init (w/o BN)" uniform-no-bn "${STOP[@]}" --init uniform --norm none \
    --optimizer adam -- "${ALL[@]}"
row rows "informative init (w/o BN)" informative-no-bn --norm none --optimizer adam -- "${ALL[@]}"
# Not in the paper's tables, but said in its text: without batch norm only Adam at 0.0001 can be used, JEM
# cannot use a larger rate either, and proximity matters most where M is small.
row rows "informative init (w/o BN), SGD at 0.1" informative-no-bn-sgd "${STOP[@]}" --norm none \
    -- "${ALL[@]}"
row rows "w/o Proximity (M=5)" no-proximity-m5 --n_steps 5 --eps inf -- "${ALL[@]}"
row rows "JEM (K=20), Adam at 0.001" jem-k20-fast "${JEM[@]}" --lr 0.001 -- "${ALL[@]}"
# What becomes of the row that our guard ends, if only the released code's rule (|loss| > 1e8) ends it.
row rows "random init (w/ BN), guard off" uniform-bn-unguarded "${STOP[@]}" --init uniform \
    --max_gap inf --max_saturated 1 --min_accuracy_ratio 0 -- "${ALL[@]}"
