#!/usr/bin/env bash
# Table 4: milliseconds per iteration of JEM++ for all M x N and of JEM (K = 20), timed turn by turn
# in one run. Then prints the table, with the ratio to JEM beside the paper's. Takes minutes, because
# no model is trained. Flags go to benchmark_table4.py (--repeats 5, --fast, --depth, --device ...).
# What this scale has timed is not timed again: delete its lines in OUT/table4.jsonl.
source "$(dirname "$0")/common.sh"

recorded table4 speed ||
    python scripts/benchmark_table4.py --results "$OUT/table4.jsonl" --name "$SCALE/speed" \
        --data_root "$DATA" "${SIZE[@]}" ${WORDS[@]+"${WORDS[@]}"} || {
        code=$?
        [ -s "$OUT/table4.jsonl" ] || rm -f "$OUT/table4.jsonl"
        exit $code
    }
echo
python scripts/make_tables.py --results "$OUT" | awk '/^### /{on = /Table 4/} on'
