#!/usr/bin/env bash
# Table 4: milliseconds an iteration of JEM++ over M x N and of JEM (K = 20), turn by turn in one run;
# then the table, with the ratio to JEM beside the paper's. Minutes, not hours: no model is trained.
# Words go to benchmark_table4.py (--repeats 5, --fast, --depth, --width, --device ...).
source "$(dirname "$0")/common.sh"

python scripts/benchmark_table4.py --results "$OUT/table4.jsonl" --data_root "$DATA" "${SIZE[@]}" \
    ${WORDS[@]+"${WORDS[@]}"}
echo
python scripts/make_tables.py --results "$OUT" | awk '/^### /{on = /Table 4/} on'
