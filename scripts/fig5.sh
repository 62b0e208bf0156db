#!/usr/bin/env bash
# Fig. 5: learning curves of JEM++ with M = 5, 10, 20, without proximity, and of JEM: test accuracy
# against epoch, with divergences marked. Uses the runs of table2.sh and table5.sh and trains missing
# ones. The points are records in OUT/fig5.jsonl, which draw the lines of runs that are not there.
source "$(dirname "$0")/common.sh"

LINES=()
line() {  # line LABEL RUN FLAGS...: the runs of one line, over all seeds
    local label=$1 run=$2 runs=()
    shift 2
    for SEED in $SEEDS; do
        local code=0
        recorded fig5 "$run-seed$SEED" || train "$run" "$@" || code=$?
        if [ $code = 0 ] || [ $code = 3 ]; then  # 3: it diverged, so its curve ends early
            runs+=("$RUNS/$run-seed$SEED")
        elif [ $code != 4 ]; then
            left_out $code "$label, seed $SEED"
        fi
    done
    if [ ${#runs[@]} -gt 0 ]; then LINES+=(--line "$label" "${runs[@]}"); fi
}
line "M=5" jempp-m5 --n_steps 5
line "M=10" jempp-m10 --n_steps 10
line "M=20" jempp-m20 --n_steps 20
line "M=10, w/o proximity" no-proximity --eps inf
line "JEM, K=20" jem-k20 "${JEM[@]}"
if [ ${#LINES[@]} = 0 ]; then exit; fi
python scripts/figures.py curves --scale "$SCALE" --records "$OUT/fig5.jsonl" \
    --out "$OUT/figures/fig5_$SCALE.png" "${LINES[@]}"
