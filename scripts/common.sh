# Sourced by the table and figure scripts. What they take from the environment:
#   SCALE  paper (default): the paper's runs. small: WRN-10-1 on 4,800 images of the same data, a
#          CPU evening. tiny: a smoke run of a minute on digits.
#   SEEDS  training seeds, "1" by default; "1 2 3" gives mean and standard deviation.
#   DATA   folder of the data sets (data). RUNS: run folders (runs/$SCALE). OUT: records (results;
#          tiny: a folder beside the runs, so that a smoke run leaves the real records alone).
# Words of the command line go to train_jempp.py. Finished runs and evaluations are skipped, stopped
# ones go on; a run that diverges is recorded as one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

SCALE=${SCALE:-paper} SEEDS=${SEEDS:-1} DATA=${DATA:-data}
RUNS=${RUNS:-runs/$SCALE}
WORDS=("$@")
EVAL=(--splits test)  # evaluation flags of the scale
case $SCALE in
    paper) SIZE=(--depth 28 --width 10) LABELLED=128 ;;
    small) LABELLED=64
           SIZE=(--depth 10 --width 1 --batch_size 32 --n_train 4800 --n_epochs 3
                 --warmup_iters 50 --decay_epochs 2 --print_every 50)
           EVAL+=(--attack_restarts 2 --chain_steps 200 --n_attack 300) ;;
    tiny)  LABELLED=32
           SIZE=(--dataset digits --depth 10 --width 1 --batch_size 16 --n_train 48 --n_epochs 1
                 --warmup_iters 2 --decay_epochs --print_every 1 --buffer_size 60)
           EVAL+=(--attack_restarts 1 --attack_steps 2 --n_attack 20 --chain_steps 10
                 --chain_batch 20 --n_images 100 --is_splits 2 --kid_subset_size 20 --eps_linf 8 --eps_l2 0.5
                 --ood interp uniform) ;;
    *) echo "SCALE is paper, small or tiny, not $SCALE" >&2; exit 2 ;;
esac
if [ "$SCALE" = tiny ]; then OUT=${OUT:-$RUNS/results}; else OUT=${OUT:-results}; fi
mkdir -p "$RUNS" "$OUT/figures"

# The paper's baselines as flags; JEM++ is the defaults.
SOFTMAX=(--p_x_weight 0)
JEM=(--norm none --init uniform --optimizer adam --weight_decay 0 --in_steps 0 --sgld_lr 1
     --sgld_std 0.01 --n_steps 20 --eps inf --no-pixel_clamp --sample_mode eval --n_epochs 200
     --decay_epochs 160 180 --decay_rate 0.3)
IGEBM=("${JEM[@]}" --p_x_weight 0 --p_y_given_x_weight 0 --p_x_y_weight 1)  # as near as flags come

ended() { grep -q "\"kind\": \"end\".*\"reason\": \"$2\"" "$RUNS/$1/train.jsonl" 2>/dev/null; }

# train RUN FLAGS...: train RUN-seed$SEED or go on with it. Returns 1 where it diverged.
train() {
    local run=$1-seed$SEED code=0
    shift
    if ended "$run" diverged; then return 1; fi
    if ! ended "$run" finished; then
        echo "== $run"
        # a table shows what diverges: --on_divergence stop, not the default's rollback
        python train_jempp.py --data_root "$DATA" --run_dir "$RUNS/$run" --seed "$SEED" \
            --on_divergence stop "$@" "${SIZE[@]}" ${WORDS[@]+"${WORDS[@]}"} || code=$?
        case $code in 0) ;; 3) return 1 ;; *) exit $code ;; esac
        ended "$run" finished || exit 75  # --max_steps among the words: run again to go on
    fi
}

# measure TABLE METHOD RUN EVAL_FLAGS...: append the records of RUN's best checkpoint to
# OUT/TABLE.jsonl under the paper's name METHOD, once and whole. A run that diverged is recorded as
# such, whatever its best checkpoint before that was worth.
measure() {
    local table=$1 method=$2 run=$3-seed$SEED
    shift 3
    local done="$RUNS/$run/$table.measured" file="$RUNS/$run/eval/$table.jsonl"
    [ -e "$done" ] && return
    mkdir -p "$RUNS/$run/eval"
    rm -f "$file"
    python scripts/record_run.py "$RUNS/$run" --method "$method" --results "$file"
    if [ -e "$RUNS/$run/best.pt" ]; then
        python eval_jempp.py --load_path "$RUNS/$run/best.pt" --labels "$method" --method "$method" \
            --results "$file" --data_root "$DATA" "${EVAL[@]}" "$@"
    fi
    touch "$done"
    cat "$file" >> "$OUT/$table.jsonl"
}

# row TABLE METHOD RUN FLAGS... -- EVAL_FLAGS...: train and measure one row for every seed.
row() {
    local table=$1 method=$2 run=$3 flags=()
    shift 3
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    for SEED in $SEEDS; do
        train "$run" "${flags[@]}" || echo "$run-seed$SEED diverged: recorded as such"
        measure "$table" "$method" "$run" "$@"
    done
}

# The network whose features stand in for Inception (fd_features): the softmax model, seed 1.
features() {
    SEED=1 train softmax "${SOFTMAX[@]}" ||
        { echo "the softmax network diverged: there are no features to judge by" >&2; exit 3; }
    FEATURES=(--features "$RUNS/softmax-seed1/best.pt")
}
