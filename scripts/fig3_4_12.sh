#!/usr/bin/env bash
# Figs 3, 4 and 12: unconditional and class-conditional samples, from the buffer and from scratch, of
# the JEM++ (M = 10) of table2.sh. Figs 4 and 12 need DATASET=svhn or cifar100. The pictures are in
# the run folder's eval/. At SCALE=paper training takes most of the time (about a day on one
# data-centre GPU).
source "$(dirname "$0")/common.sh"

NAME=${DATASET:-cifar10} PREFIX=
[ "$NAME" = cifar10 ] || PREFIX=$NAME-
row figures "JEM++ (M=10)" "${PREFIX}jempp-m10" --dataset "$NAME" --n_steps 10 -- --eval samples
