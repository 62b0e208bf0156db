# Sourced by the table and figure scripts. They read these environment variables:
#   SCALE  paper (default): the paper's runs. cpu: the same on all of CIFAR, 10 epochs of a WRN-16-2
#          with a stem of stride 2, 9 PFLOP in all, a night or two on two CPU cores. digits: WRN-10-2
#          with such a stem on digits, a miniature of the paper's schedule, minutes a row on one CPU
#          core. tiny: a smoke run of a minute on digits.
#   SEEDS  training seeds (default "1"). "1 2 3" gives mean and standard deviation.
#   DATA   folder of the data sets (default data).
#   RUNS   run folders (default runs/$SCALE).
#   OUT    records (default results). The default is results/digits for SCALE=digits. For SCALE=tiny
#          it is a folder inside RUNS, so that a smoke run does not touch the real records.
#   PLAN   if set, nothing is computed: the training commands that are left are printed, one a line
#          with tabs between words, for train_all.py.
#   READY  if set, nothing is trained: the runs that have ended are measured.
# Command-line flags go to train_jempp.py. A row whose records are in OUT/TABLE.jsonl is neither
# trained nor measured again, on whatever machine and whatever the flags: other flags need other RUNS
# and OUT, and who deletes its lines has it measured again. Runs that stopped continue. Rollbacks and
# runs that diverge for good are recorded as such. If a row cannot be trained or measured, a line says
# so, the rest continues, and the final exit code is not 0. A row of which one number could not be had
# (a line says so, too) counts as measured.
set -euo pipefail
if [[ " $* " = *" --help "* || " $* " = *" -h "* ]]; then
    for file in "$0" "${BASH_SOURCE[0]}"; do  # the comments at their top
        sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$file"
    done
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

SCALE=${SCALE:-paper} SEEDS=${SEEDS:-1} DATA=${DATA:-data}
read -rd '' -a LIST <<<"$SEEDS" || true
SEEDS=$(printf '%s\n' ${LIST[@]+"${LIST[@]}"} | awk '!there[$0]++' | paste -sd ' ')
[[ $SEEDS =~ ^(0|[1-9][0-9]*)(\ (0|[1-9][0-9]*))*$ ]] ||
    { echo "SEEDS is whole numbers with spaces between, as in \"1 2 3\", not \"$SEEDS\"" >&2; exit 2; }
RUNS=${RUNS:-runs/$SCALE}
WORDS=("$@")
EVAL=(--splits test)  # evaluation flags of the scale
DROPS=() JEM_DROPS=()  # epochs where the rate drops, at the smaller scales, and JEM's
PICTURES=()
CHECKPOINT=best.pt    # what is measured
case $SCALE in
    paper) SIZE=(--depth 28 --width 10) LABELLED=128 ;;
    cpu)   LABELLED=128 RECALIBRATE=5000
           # at 40, 60, 80 % of the epochs (the paper's: 33, 67, 83), JEM's at its own 80 and 90 %
           DROPS=(--decay_epochs 4 6 8) JEM_DROPS=(--decay_epochs 8 9)
           # a slot of the buffer is visited 22 times an epoch, 225 in all (the paper's: 4.5, 675)
           SIZE=(--depth 16 --width 2 --stride_first --stem_stride 2 --n_epochs 10
                 --warmup_iters 500 --buffer_size 2000 --print_every 100 --keep_every 2
                 --num_threads 1 --fast)
           EVAL+=(--attack_restarts 2 --chain_steps 200)
           SVHN=$DATA/svhn-test-10000  # the first test digits as images, where SVHN is not there
           [ ! -d "$SVHN" ] || EVAL+=(--ood "svhn=folder:$SVHN" interp cifar100 celeba) ;;
    tiny)  LABELLED=32
           SIZE=(--dataset digits --depth 10 --width 1 --stride_first --stem_stride 2
                 --batch_size 16 --n_train 48 --n_epochs 1 --warmup_iters 2 --decay_epochs
                 --print_every 1 --buffer_size 60)
           EVAL+=(--attack_restarts 1 --attack_steps 2 --n_attack 20 --chain_steps 10
                 --chain_batch 20 --n_images 100 --is_splits 2 --kid_subset_size 20 --eps_linf 8 --eps_l2 0.5
                 --ood interp uniform) ;;
    digits) CHECKPOINT=last.pt  # 137 validation images tie long before the schedule ends
            DROPS=(--decay_epochs 25 50 62) JEM_DROPS=(--decay_epochs 60 67)
            LABELLED=64 RECALIBRATE=1000 DATASETS=${DATASETS:-digits} OUT=${OUT:-results/digits}
            SIZE=(--dataset digits --depth 10 --width 2 --stride_first --stem_stride 2
                  --batch_size 32 --n_epochs 75 --warmup_iters 50
                  --buffer_size 290 --print_every 20 --keep_every 25 --num_threads 1 --fast)
            EVAL+=(--attack_restarts 2 --n_attack 300 --chain_steps 200 --is_splits 2
                   --kid_subset_size 100 --ood interp uniform constant) ;;
    *) echo "SCALE is paper, cpu, digits or tiny, not $SCALE" >&2; exit 2 ;;
esac
if [ "$SCALE" = tiny ]; then OUT=${OUT:-$RUNS/results}; else OUT=${OUT:-results}; fi
if [ -n "${PLAN:-}" ]; then
    python() { if [ "$1" = train_jempp.py ]; then (IFS=$'\t'; printf '%s\n' "$*"); fi; }
else
    mkdir -p "$RUNS" "$OUT/figures" 2>/dev/null && [ -w "$RUNS" ] && [ -w "$OUT" ] ||
        { echo "$RUNS or $OUT cannot be written: name other folders with RUNS and OUT" >&2; exit 2; }
fi

# The flags of the paper's baselines. JEM++ is the defaults. By default a run rolls back when it
# diverges. Rows where the paper shows that the method diverges stop instead.
STOP=(--on_divergence stop)
SOFTMAX=(--p_x_weight 0)
JEM=($(<scripts/jem.flags) ${JEM_DROPS[@]+"${JEM_DROPS[@]}"})
IGEBM=("${JEM[@]}" --p_x_weight 0 --p_y_given_x_weight 0 --p_x_y_weight 1)  # the closest by flags
JEM+=("${STOP[@]}")

# left_out CODE WHAT: print that WHAT is left out, for the reason printed above, and continue. A
# signal or a run that was stopped early ends the script.
MISSED=0
trap 'code=$?; exit $((code ? code : MISSED))' EXIT
left_out() {
    if [ "$1" = 75 ] || [ "$1" -ge 128 ]; then exit "$1"; fi
    MISSED=$1
    echo "left out: $2" >&2
}

# ended RUN REASON: whether the last thing that RUN did was to end for REASON.
ended() {
    tail -n 1 "$RUNS/$1/train.jsonl" 2>/dev/null | grep -q "\"kind\": \"end\".*\"reason\": \"$2\""
}

# train RUN FLAGS...: train RUN-seed$SEED or continue it. FLAGS may have drops of their own. Returns 3
# if it diverged for good, 4 if READY and it has not ended, which a line says.
train() {
    local run=$1-seed$SEED
    shift
    if ended "$run" diverged; then return 3; fi
    if ! ended "$run" finished; then
        [ -z "${READY:-}" ] || { echo "$run has not ended: not measured"; return 4; }
        [ -n "${PLAN:-}" ] || echo "== $run"
        python train_jempp.py --data_root "$DATA" --run_dir "$RUNS/$run" --seed "$SEED" \
            ${DROPS[@]+"${DROPS[@]}"} "$@" "${SIZE[@]}" ${WORDS[@]+"${WORDS[@]}"} || return $?
        # stopped by --max_steps: run again to continue
        [ -n "${PLAN:-}" ] || ended "$run" finished || exit 75
    fi
}

# FID: the evaluations of generated images. fd_features takes a classifier in place of Inception: the
# published one at SCALE=cpu, so that rows of different machines are judged alike, else the softmax
# row of seed 1, which is trained first.
SOFTMAX_ROW=$RUNS/softmax-seed1/$CHECKPOINT
FID=(fid --features "$SOFTMAX_ROW")
[ "$SCALE" != cpu ] || FID=(fid --features results/models/cifar10_judge)
softmax_first() {
    local code=0
    if [[ " $* " = *" $SOFTMAX_ROW "* ]]; then SEED=1 train softmax "${SOFTMAX[@]}" || code=$?; fi
    [ $code = 3 ] || return $code  # where it diverged, its checkpoint judges
}

# recorded TABLE RUN: whether OUT/TABLE.jsonl holds RUN of this scale.
recorded() { grep -qsF "\"run\": \"$SCALE/$2\"" "$OUT/$1.jsonl"; }

# batch_norm RUN: whether its log's first line does not say that the network has no norm.
batch_norm() { ! head -n 1 "$RUNS/$1/train.jsonl" | grep -q '"norm": "none"'; }

# measure TABLE METHOD RUN EVAL_FLAGS...: append the records of RUN's CHECKPOINT to
# OUT/TABLE.jsonl under the paper's name METHOD, all at once, and copy the evaluation's PICTURES to
# OUT/figures. A run that diverged is recorded as diverged too. The file that collects them is this
# script's own: an evaluation that outlives a killed script writes into none that another fills.
measure() {
    local table=$1 method=$2 run=$3-seed$SEED
    shift 3
    local file="$RUNS/$run/eval/$table.$$.jsonl" checkpoint="$RUNS/$run/$CHECKPOINT" picture latest
    if [ -n "${PLAN:-}" ]; then return; fi
    if [ ! -e "$checkpoint" ] && ! ended "$run" diverged; then
        echo "$run has ended and $checkpoint is not there: remove $RUNS/$run to train it again" >&2
        return 2
    fi
    mkdir -p "$RUNS/$run/eval"
    rm -f "$file"  # of a killed script of the same number
    python scripts/record_run.py "$RUNS/$run" --method "$method" --name "$SCALE/$run" \
        --results "$file" || return $?
    if [ -e "$checkpoint" ]; then
        python eval_jempp.py --load_path "$checkpoint" --labels "$method" --method "$method" \
            --results "$file" --data_root "$DATA" "${EVAL[@]}" "$@" || return $?
        if [ -n "${RECALIBRATE:-}" ] && [[ " $* " = *" accuracy "* ]] && batch_norm "$run"; then
            python eval_jempp.py --load_path "$checkpoint" --labels "$method" \
                --method "$method" --results "$file" --data_root "$DATA" --splits test \
                --eval accuracy calibration --recalibrate_bn "$RECALIBRATE" || return $?
        fi
    fi
    for picture in ${PICTURES[@]+"${PICTURES[@]}"}; do
        latest=$(ls -t "$RUNS/$run/eval/"*"_$picture.png" 2>/dev/null | head -n 1) || true
        [ -z "$latest" ] || cp "$latest" "$OUT/figures/${SCALE}_${run}_$picture.png" || return $?
    done
    python scripts/keep_records.py "$file" "$OUT/$table.jsonl" || return $?
    mv "$file" "$RUNS/$run/eval/$table.jsonl"
}

# row TABLE METHOD RUN FLAGS... -- EVAL_FLAGS...: train and measure one row for every seed.
row() {
    local table=$1 method=$2 run=$3 flags=()
    shift 3
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    for SEED in $SEEDS; do
        local code=0
        if recorded "$table" "$run-seed$SEED"; then continue; fi
        softmax_first "$@" || code=$?
        [ $code != 0 ] || train "$run" "${flags[@]}" || code=$?
        if [ $code = 3 ]; then echo "$run-seed$SEED diverged: recorded as such"; code=0; fi
        if [ $code = 0 ]; then measure "$table" "$method" "$run" "$@" || code=$?; fi
        case $code in 0 | 4) ;; *) left_out $code "$method, seed $SEED ($table)" ;; esac
    done
}
