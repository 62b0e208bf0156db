#!/usr/bin/env bash
# Fig. 5: learning curves (test accuracy against epoch, a divergence marked) of JEM++ with M = 5, 10, 20,
# without proximity, and of JEM. Uses and completes the runs of table2.sh and table5.sh.
source "$(dirname "$0")/common.sh"

for SEED in $SEEDS; do
    for M in 5 10 20; do train "jempp-m$M" --n_steps $M || true; done
    train no-proximity --eps inf || true
    train jem-k20 "${JEM[@]}" || true
done
LINES=()
line() {  # line LABEL RUN: the runs of one line, over all seeds
    LINES+=(--line "$1")
    for SEED in $SEEDS; do LINES+=("$RUNS/$2-seed$SEED"); done
}
line "M=5" jempp-m5
line "M=10" jempp-m10
line "M=20" jempp-m20
line "M=10, w/o proximity" no-proximity
line "JEM, K=20" jem-k20
python scripts/figures.py curves --out "$OUT/figures/fig5_$SCALE.png" "${LINES[@]}"
