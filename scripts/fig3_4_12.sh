#!/usr/bin/env bash
# Figs 3, 4 and 12: unconditional and class-conditional samples, from the buffer and from scratch, of
# the JEM++ (M = 10) of table2.sh and table3.sh. DATASETS: cifar10 (Fig. 3), svhn and cifar100 (Figs 4
# and 12). The pictures are in the run folders' eval/, those by class in OUT/figures too.
source "$(dirname "$0")/common.sh"

PICTURES=(buffer_by_class scratch_by_class)
[ "$SCALE" != cpu ] || DATASETS=${DATASETS:-cifar10 cifar100}
for NAME in ${DATASETS:-cifar10 svhn cifar100}; do
    case $NAME in cifar10|digits) PREFIX= ;; *) PREFIX=$NAME- ;; esac
    row figures "JEM++ (M=10)" "${PREFIX}jempp-m10" --dataset "$NAME" --n_steps 10 -- --eval samples
done
