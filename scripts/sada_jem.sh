#!/usr/bin/env bash
# SADA-JEM (Yang, Su and Ji, CVPR 2023; K = 5) on CIFAR-10 with WRN-28-10, as its released code runs it:
# a p(x) batch without augmentation, no noise, all 50,000 training images, 128 labelled images a step,
# 5 clamped steps of 1.0 (what PYLD-5-5 at 0.2 is as well), sharpness-aware minimisation. Its paper says
# 95.5 % and FID 9.41, of the most confident 90 % of each class. The radius 2 of *adaptive* SAM is the
# released code's default, which its published command leaves alone. Without validation images the
# checkpoint that is measured is the last one. SCALE=paper: about two days on one data-centre GPU.
source "$(dirname "$0")/common.sh"

row sada_jem "SADA-JEM (K=5)" sada-jem $(<scripts/sada_jem.flags) --labelled_batch "$LABELLED" \
    -- --eval accuracy "${FID[@]}" --top 0.9
