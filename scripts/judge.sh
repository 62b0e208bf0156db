#!/usr/bin/env bash
# How far generated images are from a data set's: fd_features in a classifier's features, which is not
# FID, beside real and spoiled images that give the numbers a scale. N images of each kind (2000).
#   JUDGE    the classifier (RUNS/cpu-judge/best.pt, by MODEL=judge bash scripts/train_cpu.sh)
#   MODELS   runs of scripts/train_cpu.sh whose buffer is judged (cpu-hybrid cpu-paper)
#   RUNS     their folder (runs)
# Minutes on a CPU. Records: results/judge.jsonl, where a row that is there is not measured again.
export RUNS=${RUNS:-runs}
source "$(dirname "$0")/common.sh"
JUDGE=${JUDGE:-$RUNS/cpu-judge/best.pt} MODELS=${MODELS:-cpu-hybrid cpu-paper} N=${N:-2000}

if [ ! -e "$JUDGE" ]; then
    echo "judge.sh: no classifier $JUDGE: MODEL=judge bash scripts/train_cpu.sh trains it" >&2
    exit 2
fi

# distance METHOD RUN FLAGS...: one row, unless it is there
distance() {
    local file="$RUNS/$2/eval/judge.jsonl" code=0
    if grep -qsF "\"method\": \"$1\"" "$OUT/judge.jsonl"; then return; fi
    python eval_jempp.py --eval fid --features "$JUDGE" --method "$1" --load_path "$RUNS/$2/best.pt" \
        --data_root "$DATA" --n_samples "$N" --results "$file" "${@:3}" || code=$?
    if [ $code = 0 ]; then tail -n 1 "$file" >> "$OUT/judge.jsonl"; else left_out $code "$1"; fi
}

FIRST=${MODELS%% *}
distance "training images" "$FIRST" --source train
distance "training images, against test" "$FIRST" --source train --reference test
distance "test images" "$FIRST" --source test
distance "test images with noise 0.1" "$FIRST" --source test --sigma 0.1
distance "CIFAR-100" "$FIRST" --source cifar100
distance "class Gaussians" "$FIRST" --source p0
for MODEL in $MODELS; do distance "buffer of $MODEL" "$MODEL"; done
