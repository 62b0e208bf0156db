#!/usr/bin/env bash
# Fig. 6: accuracy, IS and FID of JEM++ (M = 10) over its epochs, from a checkpoint every KEEP epochs
# (10 at SCALE=paper). At scales whose runs all keep checkpoints, that is the run of table2.sh.
# IS and FID need the Inception weights, fd_features does not.
source "$(dirname "$0")/common.sh"

case $SCALE in
    paper) RUN=evolution KEEP=(--keep_every "${KEEP:-10}") ;;
    tiny)  RUN=evolution KEEP=(--keep_every "${KEEP:-1}") ;;
    *)     RUN=jempp-m10 KEEP=() ;;
esac
SEED=${SEEDS%% *}
FILE="$OUT/fig6.jsonl"
if ! recorded fig6 "$RUN-seed$SEED"; then
    code=0
    softmax_first "${FID[@]}" || code=$?
    [ $code != 0 ] || train "$RUN" --n_steps 10 ${KEEP[@]+"${KEEP[@]}"} || code=$?
    if [ $code = 3 ]; then echo "diverged: what was kept is shown"
    elif [ $code = 4 ]; then exit
    elif [ $code != 0 ]; then left_out $code "Fig. 6"; exit; fi
    NEW="$RUNS/$RUN-seed$SEED/fig6.$$.jsonl"
    if [ -z "${PLAN:-}" ]; then
        rm -f "$NEW"
        python scripts/record_run.py "$RUNS/$RUN-seed$SEED" --method "JEM++ (M=10)" \
            --name "$SCALE/$RUN-seed$SEED" --results "$NEW"
        python eval_jempp.py --load_path "$RUNS/$RUN-seed$SEED"/epoch_*.pt --eval accuracy \
            "${FID[@]}" --splits test --method "JEM++ (M=10)" --data_root "$DATA" \
            --results "$NEW" "${EVAL[@]}"
        python scripts/keep_records.py "$NEW" "$FILE"
    fi
fi
python scripts/figures.py evolution "$RUNS/$RUN-seed$SEED" --records "$FILE" \
    --out "$OUT/figures/fig6_$SCALE.png"
