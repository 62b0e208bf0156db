#!/usr/bin/env bash
# Build, check and time everything in one call on a GPU, in at most BUDGET seconds (540):
#   bash scripts/gpu_check.sh                    records in results/gpu, or OUT
#   DEVICE=cpu TINY=1 bash scripts/gpu_check.sh  the same steps on small shapes, to test this script
# First, in parallel: compile all programs, compare our steps with the literal ones, and for every
# switch train, evaluate and resume a run on digits. Then come the timings, one at a time, the most
# important first. A failing step does not stop the others, but the final exit code is 1. A step that
# no longer fits the budget is skipped with a message. Files: benchmark.jsonl (`benchmark.py --show`
# prints it), build.jsonl (cold first iterations, its other times are meaningless), profile.txt,
# log.txt.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
OUT=${OUT:-results/gpu} DEVICE=${DEVICE:-cuda} BUDGET=${BUDGET:-540} TINY=${TINY:-}
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"
rm -f "$OUT"/{build,benchmark}.jsonl "$OUT"/{profile,log}.txt
FAILED=0

BIG=28-10 SMALL=28-2 LAST=16-2
BENCH=(scripts/benchmark.py --json --device "$DEVICE" --dataset digits --image_size 32 --no-download)
SMOKE=(train_jempp.py --device "$DEVICE" --dataset digits --depth 10 --width 1 --n_valid 1389
       --batch_size 16 --buffer_size 100 --n_steps 5 --print_every 1 --num_threads 1)  # 3 steps an epoch
GRID=(--M 10 --N 5 20)
SWITCHES=("--compile default" "--compile reduce-overhead" "--amp bf16" --fast
          "--deterministic --adversarial linf --accumulate 2 --norm group"
          "--sam 0.1 --p_x_y_weight 1 --ema 0.99 --bn_update real"
          "--in_steps 0 --sgld_lr 1 --sgld_std 0.01 --eps inf --sample_mode eval --norm none")
ALONE_SMALL=("" --cudnn_benchmark --tf32 "--amp bf16" "--compile default"
             "--compile reduce-overhead" "--fast --no-channels_last")
ALONE_BIG=("" "--cudnn_benchmark --tf32" "--cudnn_benchmark --amp bf16"
           "--cudnn_benchmark --amp bf16 --compile default" "--fast --no-channels_last")
PATIENCE=2  # a step is stopped after this many times its expected duration
if [ "$TINY" ]; then
    PATIENCE=60 BIG=10-1 SMALL=10-1 LAST=10-1
    BENCH+=(--image_size 16 --batch_size 16 --buffer_size 100 --num_threads 1)
    GRID=(--M 2 --N 5 20)
    SWITCHES=("--compile reduce-overhead" "--amp bf16" "${SWITCHES[@]:4}")
    ALONE_SMALL=("--amp bf16") ALONE_BIG=("--tf32 --cudnn_benchmark")
fi

# failed CODE LOG: report a failed step. Code 124 is a timeout.
failed() {
    echo "-- FAILED (code $1), last lines of its log:"
    tail -n 3 "$2"
    FAILED=1
}

left() { echo $((BUDGET - 10 - SECONDS)); }  # seconds left, except 10 for the summary

# limit EXPECTED: the time limit in seconds of a step that is expected to take EXPECTED seconds
limit() {
    local left=$(left) most=$((PATIENCE * $1))
    if [ "$left" -lt 1 ]; then left=1; fi
    echo $((most < left ? most : left))
}

# step EXPECTED FLAGS...: run benchmark.py, or skip it if fewer than EXPECTED seconds are left.
step() {
    local expected=$1 code=0
    shift
    echo "== [$SECONDS s] benchmark.py $*"
    if [ "$(left)" -lt "$expected" ]; then
        echo "-- skipped: it takes about $expected s, and $(left) of $BUDGET are left"
        return
    fi
    timeout -k 5 "$(limit "$expected")" "$PYTHON" "${BENCH[@]}" "$@" \
        > "$WORK/out" 2> "$WORK/err" || code=$?
    { echo "== benchmark.py $*"; cat "$WORK/err"; } >> "$OUT/log.txt"
    cat "$WORK/out" >> "$OUT/benchmark.jsonl"
    if [ $code -ne 0 ]; then failed $code "$WORK/err"; fi
}

# smoke FLAGS...: train and evaluate an epoch of three steps, then resume for two more steps.
smoke() {
    local run="$WORK/run${*// /_}"
    timeout -k 5 "$(limit 60)" "$PYTHON" "${SMOKE[@]}" --run_dir "$run" --max_steps 3 "$@" &&
        timeout -k 5 "$(limit 60)" "$PYTHON" "${SMOKE[@]}" --run_dir "$run" --max_steps 5 "$@" &&
        [ "$(grep -cE '"kind": "(resume|end)"' "$run/train.jsonl")" = 2 ]
}

# evaluated: train the smoke run and evaluate it in every way that needs no download.
evaluated() {
    local run="$WORK/run_evaluated"
    timeout -k 5 "$(limit 60)" "$PYTHON" "${SMOKE[@]}" --run_dir "$run" --max_steps 3 &&
        timeout -k 5 "$(limit 100)" "$PYTHON" eval_jempp.py --device "$DEVICE" --no-download \
            --load_path "$run/best.pt" --eval accuracy calibration ood robustness samples best_worst \
            --ood uniform interp --attacks margin --attack_restarts 1 --n_attack 20 --n_images 50 \
            --eps_linf 8 --eps_l2 --chain_steps 10
}

nvidia-smi 2>&1 || true
if ! "$PYTHON" -c "from utils import machine; print(machine.pick_device('$DEVICE', 0))"; then
    echo "-- $DEVICE cannot be used: nothing was measured"
    exit 1
fi
"$PYTHON" -c 'import sys, torch, torchvision
print("python", sys.version.split()[0], "torch", torch.__version__, "cuDNN",
      torch.backends.cudnn.version(), "torchvision", torchvision.__version__)'
g++ --version | head -n 1

echo "== [$SECONDS s] at once: compile all programs, compare with the literal steps, smoke runs"
export TORCHINDUCTOR_COMPILE_THREADS=4
names=() jobs=()
background() {  # background FUNCTION FLAGS...
    local name="$*"
    names+=("${name// /_}")
    "$@" > "$WORK/${names[-1]}.out" 2> "$WORK/${names[-1]}.err" &
    jobs+=($!)
}
check() { timeout -k 5 "$(limit 80)" "$PYTHON" "${BENCH[@]}" --networks "$LAST" --check "$@"; }
build() { timeout -k 5 "$(limit 80)" "$PYTHON" "${BENCH[@]}" --only ours --repeats 1 --networks "$@"; }
for network in "$BIG" "$SMALL"; do  # the largest first, because it takes longest
    [ "$network" = "$LAST" ] || background build "$network" "${GRID[@]}" --fast
done
background build "$LAST" "${GRID[@]}" --fast --jem
for flags in "${ALONE_BIG[@]}"; do
    [[ $flags == *compile* || $flags == *fast* ]] && background build "$BIG" $flags
done
for flags in "${ALONE_SMALL[@]}"; do
    [[ $flags == *compile* || $flags == *fast* ]] && background build "$SMALL" $flags
done
for precision in float32 float64; do
    background check $precision
    background check $precision --compile reduce-overhead
done
for flags in "${SWITCHES[@]}"; do background smoke $flags; done
background evaluated
for i in "${!jobs[@]}"; do
    code=0
    wait "${jobs[$i]}" || code=$?
    { echo "== ${names[$i]}"; cat "$WORK/${names[$i]}.err"; } >> "$OUT/log.txt"
    case ${names[$i]} in
        build*) cat "$WORK/${names[$i]}.out" >> "$OUT/build.jsonl" ;;
        check*) cat "$WORK/${names[$i]}.out" >> "$OUT/benchmark.jsonl" ;;
        *) cat "$WORK/${names[$i]}.out" >> "$OUT/log.txt" ;;
    esac
    echo "[$SECONDS s] ${names[$i]}: code $code"
    if [ $code -ne 0 ]; then failed $code "$WORK/${names[$i]}.err"; fi
done

unset TORCHINDUCTOR_COMPILE_THREADS
step 40 --networks "$BIG" "${GRID[@]}" --fast --repeats 3 --profile "$OUT/profile.txt"
step 40 --networks "$SMALL" "${GRID[@]}" --fast --profile "$OUT/profile.txt"
step 30 --networks "$LAST" "${GRID[@]}" --fast --jem
step 20 --networks "$BIG" --only ours --jem --amp bf16 --cudnn_benchmark
for flags in "${ALONE_BIG[@]}"; do step 20 --networks "$BIG" --only ours $flags; done
for flags in "${ALONE_SMALL[@]}"; do step 15 --networks "$SMALL" --only ours $flags; done
[ "$TINY" ] || step 30 --networks 28-4 --fast --repeats 3

echo "== [$SECONDS s] summary of $OUT/benchmark.jsonl"
"$PYTHON" scripts/benchmark.py --show "$OUT/benchmark.jsonl"
exit $FAILED
