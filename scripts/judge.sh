#!/usr/bin/env bash
# How far generated images are from a data set's: fd_features in a classifier's features, which is not
# FID, beside real and spoiled images that give the numbers a scale. N images of each kind.
#   JUDGE    the classifier (results/models/cifar10_judge, by MODEL=judge bash scripts/train_cpu.sh)
#   MODELS   models whose buffer is judged: published folders or checkpoints (the published JEMs)
#   RUNS     folder of the work (runs)
# A published JEM holds 300 to 500 images of its buffer. So N is 300: the distance grows as N falls, and
# only equal N compare. Minutes on a CPU. Records: results/judge.jsonl, where a row that is there is not
# measured again.
export RUNS=${RUNS:-runs}
source "$(dirname "$0")/common.sh"
PUBLISHED=results/models
JUDGE=${JUDGE:-$PUBLISHED/cifar10_judge} N=${N:-300}
MODELS=${MODELS:-$PUBLISHED/cifar10_wrn16_4 $PUBLISHED/cifar10_wrn16_4_weight1}

if [ ! -e "$JUDGE" ]; then
    echo "judge.sh: no classifier $JUDGE: MODEL=judge bash scripts/train_cpu.sh trains it" >&2
    exit 2
fi

# distance METHOD MODEL FLAGS...: one row, unless it is there
distance() {
    local file="$RUNS/judge/judge.jsonl" code=0
    if grep -qsF "\"method\": \"$1\"" "$OUT/judge.jsonl"; then return; fi
    mkdir -p "$RUNS/judge"
    python eval_jempp.py --eval fid --features "$JUDGE" --method "$1" --load_path "$2" \
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
for MODEL in $MODELS; do distance "buffer of $(basename "${MODEL%/best.pt}")" "$MODEL"; done
