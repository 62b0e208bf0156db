#!/usr/bin/env bash
# Figs 2, 7 and 8: class centres and draws from p_0 for CIFAR-10, CIFAR-100 and SVHN. Takes seconds
# and trains nothing. DATASETS picks the data sets. A picture that is there is not drawn again.
source "$(dirname "$0")/common.sh"

case $SCALE in
    tiny) DATASETS=digits ;;
    cpu)  DATASETS=${DATASETS:-cifar10 cifar100} ;;
esac
for NAME in ${DATASETS:-cifar10 cifar100 svhn}; do
    [ -e "$OUT/figures/p0_$NAME.png" ] ||
        python scripts/figures.py p0 --dataset "$NAME" --data_root "$DATA" \
            --out "$OUT/figures/p0_$NAME.png" || left_out $? "$NAME"
done
