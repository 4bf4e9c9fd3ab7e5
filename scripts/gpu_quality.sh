#!/bin/bash
# What docs/quality.md wants of a machine with GPUs, in calls of a few minutes, without network.
#
#     scripts/gpu_quality.sh [build] [STAGE ...]      stages of scripts/quality.py; default: all, in order of importance
#
# Every GPU gets a process of its own and a share of the jobs. What is in KNOWN is not measured again, so that a call
# continues those before it: put what came back from them into docs/quality/. Results are merged into one packed file
# in OUT, now and then while it runs and at the end.
#
# OUT        where results go (default: build/gpu-quality)
# LIMIT      seconds from the start of the call until everything has to be done, build included (default: 560)
# PROCS      processes for each GPU (default: 2: one alone leaves it idle half of the time)
# MPS        yes: processes share a GPU at the same time, through NVIDIA's multi-process service, instead of in turns
#            (docs/lab-log.md, 2026-11-28: 17 processes on one H200 did 90,000 tokens a second)
# GPUS       how many (default: all that nvidia-smi lists)
# KNOWN      files of results (default: docs/quality/*.jsonl and .jsonl.gz)
# N          problems of each kind (default: 400)
# QUESTIONS  a file of `scripts/quality.py questions`; without it reasoning-gym must be installed
# ARGS       further options of `quality.py run`, e.g. "--text text.txt" (default: -ngl -1)
# WHEELS, PYTHON, CMAKE_ARGS: for `build`, see scripts/gpu_report.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu-quality}
LIMIT=${LIMIT:-560}
N=${N:-400}
PYTHON=${PYTHON:-python3}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
ARGS=${ARGS:--ngl -1}
PROCS=${PROCS:-2}
RESERVE=15 # seconds for merging
shopt -s nullglob
read -ra known_files <<< "${KNOWN-$(echo docs/quality/*.jsonl docs/quality/*.jsonl.gz)}"
mkdir -p "$OUT"
work=$(mktemp -d)
mps=no # whether its daemon is ours to end
trap '[ $mps = yes ] && echo quit | nvidia-cuda-mps-control; rm -rf "$work"' EXIT
# a name of its own for every call, so that files of several calls can lie in one folder
name=$(date -u +%Y%m%d-%H%M%S)
failed=0

merge() {
    local files=("$work"/*.jsonl)
    [ ${#files[@]} -eq 0 ] && return
    "$PYTHON" scripts/quality.py merge "${files[@]}" -o "$work/merged.jsonl.gz" &&
        cp "$work/merged.jsonl.gz" "$OUT/.$name" && mv "$OUT/.$name" "$OUT/gpu-$name.jsonl.gz"
}

# KEY STAGE,...: on all GPUs at once; what is in KNOWN and in this call's files counts as done
stages() {
    local key=$1 list=$2 pids=() files=("${known_files[@]}" "$work"/*.jsonl) options=() i left
    left=$((LIMIT - RESERVE - SECONDS))
    if [ "$left" -le 0 ]; then
        echo "no time is left for $list"
        return
    fi
    for file in "${files[@]}"; do options+=(--known "$file"); done
    [ -n "${QUESTIONS:-}" ] && options+=(--questions "$QUESTIONS")
    echo "== $list on $GPUS, ${left} s left"
    for ((i = 0; i < GPUS * PROCS; i++)); do
        # shellcheck disable=SC2086 # ARGS is several words
        CUDA_VISIBLE_DEVICES=$((i % GPUS)) "$PYTHON" scripts/quality.py run --stage "$list" --shard "$i/$((GPUS * PROCS))" --n-problems "$N" \
            --limit-seconds "$left" -o "$work/$key-$i.jsonl" "${options[@]}" $ARGS > >(sed -u "s/^/[$i] /") 2>&1 &
        pids+=($!)
    done
    while [ -n "$(jobs -rp)" ]; do
        sleep 1
        [ $((SECONDS % 20)) -eq 0 ] && merge
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    merge
}

if [ "${MPS:-no}" = yes ]; then
    export CUDA_MPS_PIPE_DIRECTORY="$work/mps" CUDA_MPS_LOG_DIRECTORY="$work"
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY"
    nvidia-cuda-mps-control -d || exit 1
    mps=yes
fi
if [ "${1:-}" = build ]; then
    shift
    # in this call's OUT, so that its output comes back, too
    OUT="$OUT" TESTS=no LIMIT=$((LIMIT - RESERVE)) scripts/gpu_report.sh build || exit 1
fi
all=$(IFS=,; echo "${*:-all}")
# the full cache first: budgets are shares of its traces
case ",$all," in
    *,all,* | *,full,*) stages full full ;;
esac
[ "$all" = full ] || stages rest "$all"
echo "== done after $SECONDS s: $(cd "$OUT" && echo gpu-"$name".jsonl.gz)"
exit $failed
