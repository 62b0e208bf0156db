#!/usr/bin/env bash
# Figs 13 to 22: for each class, the buffer images with the highest and lowest p(x) and p(y|x), from
# the JEM++ (M = 10) of table2.sh. The pictures are in the run folder's eval/ and in OUT/figures.
source "$(dirname "$0")/common.sh"

PICTURES=(best_p_x worst_p_x best_p_y worst_p_y)
row best_worst "JEM++ (M=10)" jempp-m10 --n_steps 10 -- --eval best_worst
