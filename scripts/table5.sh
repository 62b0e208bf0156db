#!/usr/bin/env bash
# Table 5: the ablation on CIFAR-10, all six rows at M = 10, N = 5, including the failing ones. A run
# that diverges rolls back, and its rollbacks are recorded. Random init (w/o BN) stops instead, as in
# the paper. SCALE=paper takes about a day a row on one data-centre GPU. Expect (paper): 93.5, 92.9, 92.5, no useful model, 88.6 (diverges at
# epoch 28), 91.1 %.
source "$(dirname "$0")/common.sh"

ALL=(--eval accuracy calibration "${FID[@]}")
row table5 "JEM++" jempp-m10 --n_steps 10 -- "${ALL[@]}"
row table5 "w/o Proximity" no-proximity --eps inf -- "${ALL[@]}"
row table5 "w/ Adam" adam --optimizer adam -- "${ALL[@]}"
row table5 "random init (w/ BN)" uniform-bn --init uniform -- "${ALL[@]}"
row table5 "random init (w/o BN)" uniform-no-bn "${STOP[@]}" --init uniform --norm none --optimizer adam \
    -- "${ALL[@]}"
row table5 "informative init (w/o BN)" informative-no-bn --norm none --optimizer adam -- "${ALL[@]}"
