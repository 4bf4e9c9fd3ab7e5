#!/bin/bash
# Everything that is to be said about a CUDA machine, in one call: build, parity, sanitizer, benchmarks.
#
#     scripts/gpu_report.sh [PHASE ...]      build parity sanitize greedy models bench many512 (default: all)
#
# OUT      where results go (default: build/gpu-report)
# WHEELS   a folder of wheels to install from, with no index (default: pip's own settings)
# MODELS   where random models of Llama-8B's shape are written, 21 GB (default: a new folder in TMPDIR)
# MODEL    the model of phase `greedy` (default: smollm2)
# PARTS    of the benchmark, e.g. "one many" (default: all but 402, which phase many512 runs in a build of its own)
# CASES    parts of names of the cases that racecheck and initcheck run over, between commas (default: the whole table)
# TESTS    no: `build` leaves out the test programs (parity and sanitize need them)
# LIMIT    seconds that a single check may take (default: no limit)
# RKV_LLAMA_CPP_SOURCE   a llama.cpp tree instead of the pinned archive
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu-report}
MODELS=${MODELS:-${TMPDIR:-/tmp}/rkv-models}
MODEL=${MODEL:-smollm2}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" "$MODELS"
failed=()

phase() { printf '\n== %s  (%s s)\n' "$*" "$SECONDS"; }
check() { # NAME COMMAND ...: runs it, its output into $OUT/NAME.txt, the last lines on the terminal
    local name=$1
    shift
    phase "$name: $*"
    timeout "${LIMIT:-0}" "$@" > "$OUT/$name.txt" 2>&1 || { failed+=("$name"); echo "FAILED ($?)"; }
    tail -n "${LINES_SHOWN:-6}" "$OUT/$name.txt"
}

build() {
    local pip=("$PYTHON" -m pip install --no-build-isolation --disable-pip-version-check)
    [ -n "${WHEELS:-}" ] && pip+=(--no-index --find-links "$WHEELS")
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    export CMAKE_ARGS="-DLLAMA_BUILD=OFF -DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES=${arch}-real ${CMAKE_ARGS:-}"
    check build-tools "${pip[@]}" "scikit-build-core>=1.1" "unidiff>=0.7.5" gguf
    check build "${pip[@]}" .
    [ "${TESTS:-yes}" = no ] || check build-tests cmake --build build/py3-none-* --target rkv-tests test-backend-ops
}

tests() { ls build/py3-none-*/"$1"; }

parity() {
    check parity "$(tests test-rkv-backends)" -d CUDA0
    # one head of one sequence at a time: what large budgets and many sequences lead to
    RKV_CUDA_SCRATCH=0 check parity-in-turns "$(tests test-rkv-backends)" -d CUDA0
    check generic "$(tests test-rkv-generic)" -d CUDA0
    check backend-ops "$(tests test-backend-ops)" test -o RKV -b CUDA0
    LINES_SHOWN=20 check backend-ops-speed "$(tests test-backend-ops)" perf -o RKV -b CUDA0
}

sanitize() {
    local run backends
    backends=$(tests test-rkv-backends)
    run=(compute-sanitizer --error-exitcode 9)
    check memcheck "${run[@]}" --tool memcheck "$backends" -d CUDA0
    RKV_CUDA_SCRATCH=0 check memcheck-in-turns "${run[@]}" --tool memcheck "$backends" -d CUDA0
    if [ -z "${CASES:-}" ]; then
        check racecheck "${run[@]}" --tool racecheck "$backends" -d CUDA0
        check initcheck "${run[@]}" --tool initcheck "$backends" -d CUDA0
        return
    fi
    local parts i=0
    IFS=, read -ra parts <<< "$CASES"
    for part in "${parts[@]}"; do
        i=$((i + 1))
        check "racecheck-$i" "${run[@]}" --tool racecheck "$backends" -d CUDA0 -c "$part"
        check "initcheck-$i" "${run[@]}" --tool initcheck "$backends" -d CUDA0 -c "$part"
    done
}

# greedy tokens on the GPU, with the cache in main memory, on two devices, half of the layers on each side, on the CPU
greedy() {
    local options=(-p "List the first forty prime numbers, one by one." -n 300 --temp 0 --ignore-eos --kv-budget 128
        --kv-buffer 64 --batch-size 64)
    run_greedy() { # NAME OPTION ...
        local name=$1
        shift
        phase "greedy-$name: $*"
        rkv-local run "$MODEL" "${options[@]}" "$@" > "$OUT/tokens-$name.txt" 2> "$OUT/greedy-$name.txt" ||
            { failed+=("greedy-$name"); echo "FAILED ($?)"; }
        tail -n 3 "$OUT/greedy-$name.txt"
    }
    same() { # NAME NAME: the first is the one to be held to
        if [ -s "$OUT/tokens-$1.txt" ] && cmp "$OUT/tokens-$1.txt" "$OUT/tokens-$2.txt"; then
            echo "$2: $(wc -c < "$OUT/tokens-$2.txt") bytes as $1"
        else
            failed+=("greedy: $2 differs from $1")
        fi
    }
    run_greedy gpu  -ngl 99
    run_greedy host -ngl 99 -nkvo
    GGML_CUDA_DEVICES=2 run_greedy two -ngl 99
    same gpu host
    same gpu two
    # other arithmetic in the weights' products, with a budget and without: where do stock's own tokens part?
    run_greedy cpu       -ngl 0
    run_greedy half      -ngl 15
    run_greedy stock     -ngl 99 --kv-policy none
    run_greedy stock-cpu -ngl 0  --kv-policy none
    for pair in "gpu cpu" "gpu half" "stock stock-cpu"; do
        cmp "$OUT/tokens-${pair% *}.txt" "$OUT/tokens-${pair#* }.txt"
    done
}

models() {
    local shape=(--layers 32 --heads 32 --kv-heads 8 --head-dim 128 --ff 14336 --vocab 128256 --rope-base 500000 --same-layers)
    for type in f16 q4_0; do
        [ -e "$MODELS/8b-$type.gguf" ] ||
            check "model-$type" "$PYTHON" scripts/make_random_model.py "$MODELS/8b-$type.gguf" --type "$type" "${shape[@]}"
    done
}

bench() {
    local parts=()
    for part in ${PARTS:-}; do
        parts+=(--part "$part")
    done
    LINES_SHOWN=30 check bench "$PYTHON" scripts/gpu_bench.py "$OUT/bench.json" --f16 "$MODELS/8b-f16.gguf" \
        --q4 "$MODELS/8b-q4_0.gguf" "${parts[@]}"
}

# more sequences than upstream's 256, as in the paper, and what the larger limit costs 256 of them
many512() {
    CMAKE_ARGS="-DRKV_MAX_SEQ=512 ${CMAKE_ARGS:-}" build
    PARTS="many-512 402" bench
}

for step in ${@:-build parity sanitize greedy models bench many512}; do
    "$step"
done
phase "done; failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
