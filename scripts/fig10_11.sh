#!/usr/bin/env bash
# Figs 10 and 11, and the ECEs in the paper's text: calibration of the softmax WRN, JEM and JEM++ on
# CIFAR-10 and CIFAR-100. The reliability diagrams are in the run folders' eval/. Expect (paper) ECE
# 2.35 % for JEM++ (M = 10) and 4.2 % for JEM on CIFAR-10, 3.3 % and 4.87 % on CIFAR-100.
source "$(dirname "$0")/common.sh"

for NAME in ${DATASETS:-cifar10 cifar100}; do
    case $NAME in cifar10|digits) PREFIX= ;; *) PREFIX=$NAME- ;; esac
    row ece "Standard Softmax" "${PREFIX}softmax" --dataset "$NAME" "${SOFTMAX[@]}" \
        -- --eval calibration
    [ "$SCALE $NAME" = "cpu cifar100" ] ||
        row ece "JEM (K=20)" "${PREFIX}jem-k20" --dataset "$NAME" "${JEM[@]}" -- --eval calibration
    for M in 5 10; do
        row ece "JEM++ (M=$M)" "${PREFIX}jempp-m$M" --dataset "$NAME" --n_steps $M \
            -- --eval calibration
    done
done
