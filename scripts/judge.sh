#!/usr/bin/env bash
# How far generated images are from a data set's: fd_features in a classifier's features, which is not
# FID, beside real and spoiled images that give the numbers a scale. N images of each kind.
#   JUDGE    the classifier (results/models/cifar10_judge, by MODEL=judge bash scripts/train_cpu.sh)
#   MODELS   models whose buffer is judged: published folders or checkpoints (the published JEMs)
#   RUNS     folder of the work (runs)
# A published JEM holds 300 to 500 images of its buffer. So N is 300: the distance grows as N falls, and
# only equal N compare, by one judge. Minutes on a CPU. Records: OUT/judge.jsonl, where a row that is there
# is not measured again.
export RUNS=${RUNS:-runs}
source "$(dirname "$0")/common.sh"
PUBLISHED=results/models
JUDGE=${JUDGE:-$PUBLISHED/cifar10_judge} N=${N:-300}
MODELS=${MODELS:-$PUBLISHED/cifar10_wrn16_4 $PUBLISHED/cifar10_wrn16_4_weight1}

# name_of MODEL: its folder, and the file where that is not best.pt
name_of() {
    local path=${1%/best.pt}
    if [ -d "$path" ]; then basename "$path"
    else echo "$(basename "$(dirname "$path")")/$(basename "$path")"; fi
}

[ -z "${PLAN:-}" ] || exit 0
[[ $N =~ ^[1-9][0-9]{0,5}$ ]] || { echo "N is a number of images, not \"$N\"" >&2; exit 2; }
if [ ! -e "$JUDGE" ]; then
    echo "judge.sh: no classifier $JUDGE: MODEL=judge bash scripts/train_cpu.sh trains it" >&2
    exit 2
fi
for MODEL in $MODELS; do
    if [ ! -e "$MODEL" ]; then echo "judge.sh: no model $MODEL (MODELS)" >&2; exit 2; fi
done
if [ -n "$(for MODEL in $MODELS; do name_of "$MODEL"; done | sort | uniq -d)" ]; then
    echo "judge.sh: two of MODELS have one name: name them in two calls with an OUT each" >&2
    exit 2
fi
WEIGHTS=$JUDGE
[ ! -d "$JUDGE" ] || WEIGHTS=$JUDGE/model.safetensors
SHA=$(sha256sum "$WEIGHTS" | cut -c 1-64)
if [ -e "$OUT/judge.jsonl" ] && grep -qv "\"n\": $N,.*$SHA" "$OUT/judge.jsonl"; then
    echo "judge.sh: $OUT/judge.jsonl holds rows of another N or judge: name another OUT" >&2
    exit 2
fi

# distance METHOD MODEL FLAGS...: one row, unless it is there
distance() {
    local file="$RUNS/judge/judge.$$.jsonl" code=0
    local name
    name=$(python -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1")
    if grep -qsF "\"method\": $name" "$OUT/judge.jsonl"; then return; fi
    mkdir -p "$RUNS/judge"
    rm -f "$file"
    python eval_jempp.py --eval fid --features "$JUDGE" --method "$1" --load_path "$2" \
        --data_root "$DATA" --n_samples "$N" --results "$file" "${@:3}" &&
        python scripts/keep_records.py "$file" "$OUT/judge.jsonl" || code=$?
    [ $code = 0 ] || left_out $code "$1"
}

FIRST=${MODELS%% *}
distance "training images" "$FIRST" --source train
distance "training images, against test" "$FIRST" --source train --reference test
distance "test images" "$FIRST" --source test
distance "test images with noise 0.1" "$FIRST" --source test --sigma 0.1
distance "CIFAR-100" "$FIRST" --source cifar100
distance "class Gaussians" "$FIRST" --source p0
for MODEL in $MODELS; do distance "buffer of $(name_of "$MODEL")" "$MODEL"; done
