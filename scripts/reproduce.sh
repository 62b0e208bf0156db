#!/usr/bin/env bash
# Every table and figure of the paper in one command: trains what is not trained yet, JOBS runs at a
# time (default 1), measures it, and prints the tables. A line before each run says about how long it
# takes. Running it again goes on. SCALE, SEEDS, DATA, RUNS and OUT are those of the other scripts, and
# flags go to train_jempp.py. MINUTES ends the training after that time, with its state saved. Then the
# runs that have ended are measured, and the exit code is 75. PLAN is for the scripts of tables.
# SCALE=paper takes about a month of one data-centre GPU (an estimate).
if [ -n "${PLAN:-}" ]; then echo "reproduce.sh takes no PLAN: the scripts of tables do" >&2; exit 2; fi
for name in JOBS MINUTES; do
    [[ ${!name:-1} =~ ^[1-9][0-9]{0,5}$ ]] ||
        { echo "$name is a whole number above 0, not \"${!name}\"" >&2; exit 2; }
done
source "$(dirname "$0")/common.sh"
export SCALE SEEDS DATA RUNS OUT

TOGETHER=(--jobs "${JOBS:-1}" ${MINUTES:+--max_minutes "$MINUTES"}
          --records "$OUT"/{table2,table5,fig9,table3}.jsonl)
code=0
TRAINED=(table2 table5 table7 fig5 fig6 fig9 fig10_11 table3 fig3_4_12 fig13_22)
for name in "${TRAINED[@]}"; do PLAN=1 bash "scripts/$name.sh" "$@"; done |
    python scripts/train_all.py "${TOGETHER[@]}" || code=$?
case $code in
    0) ;;
    75) export READY=1 ;;
    *) left_out $code "a run" ;;
esac
for name in table4_speed "${TRAINED[@]}" fig2_7_8; do
    bash "scripts/$name.sh" "$@" || left_out $? "a part of $name.sh"
done
python scripts/make_tables.py --results "$OUT"
[ $code != 75 ] || exit 75
