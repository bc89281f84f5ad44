#!/bin/sh
# Everything that needs a GPU, in one call: tests, brick-by-brick comparison, soak, benchmark with a dated report.
#
#   scripts/gpu_check.sh                        all of it, in less than nine minutes
#   scripts/gpu_check.sh --tests [-k EXPR]      tests only
#   scripts/gpu_check.sh --diff                 CPU and GPU brick by brick only
#   scripts/gpu_check.sh --soak                 10 000 short requests only
#   scripts/gpu_check.sh --bench --models 1b,8b --only decode,profile
#
# --tests-limit S and --bench-limit S bound the parts (seconds). Reports go to benchmarks/, and with all logs to $OUT
# where that is set. COMMIT names the commit where there is no git.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
parts="" models="1b,8b,8b-q8" only="" expression="" tests_limit=220 bench_limit=250 files=""
while [ $# -gt 0 ]; do
    case "$1" in
        --tests | --diff | --soak | --bench) parts="$parts ${1#--}" ;;
        --models) models=$2; shift ;;
        --only) only=$2; shift ;;
        -k) expression=$2; shift ;;
        --dir) files=$2; shift ;;
        --tests-limit) tests_limit=$2; shift ;;
        --bench-limit) bench_limit=$2; shift ;;
        *) echo "unknown argument $1; see the head of $0" >&2; exit 2 ;;
    esac
    shift
done
[ -n "$parts" ] || parts="tests diff soak bench"
logs=${OUT:-$(mktemp -d)}
mkdir -p "$logs"

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>&1 | head -8
"$PYTHON" - <<'EOF'
import os, subprocess, sys
from scripts.gpu_bench import environment_lines
print("; ".join(f"{key} {value}" for key, value in environment_lines().items()))
from engine.cuda import availability
print("engine.cuda:", availability() or "usable")
EOF

scratch=""
case "$parts" in *bench*)
    # The files are written while the tests run.
    [ -n "$files" ] || { scratch=$(mktemp -d); files=$scratch; }
    "$PYTHON" -m scripts.gpu_bench --models "$models" --dir "$files" --make-only --keep --time-limit 200 \
        >"$logs/make.log" 2>&1 &
    maker=$!
    ;;
esac
cleanup() { [ -z "$scratch" ] || rm -rf "$scratch"; }
trap cleanup EXIT
trap 'exit 130' INT TERM

status=0
tests_said="not run" diff_said="not run" soak_said="not run" bench_said="not run"
case "$parts" in *tests*)
    set -- -m gpu -rsfE --durations=15 -p no:cacheprovider
    [ -z "$expression" ] || set -- "$@" -k "$expression"
    timeout "$tests_limit" "$PYTHON" -m pytest "$@" >"$logs/tests.log" 2>&1
    code=$?
    grep -n -E "^(FAILED|ERROR|E   )" "$logs/tests.log" | cut -c1-230 | head -60
    grep -E "^SKIPPED" "$logs/tests.log" | cut -c1-160 | head -5
    sed -n '/slowest/,/^$/p' "$logs/tests.log" | head -20
    tests_said=$(tail -1 "$logs/tests.log" | cut -c1-120)
    [ $code -ne 124 ] || tests_said="stopped after $tests_limit s: $tests_said"
    [ $code -eq 0 ] || status=1
    ;;
esac
case "$parts" in *diff*)
    if timeout 45 "$PYTHON" -m scripts.diff_backends --json "$logs/diff.json" >"$logs/diff.log" 2>&1; then
        diff_said="all bricks agree"
    else
        diff_said="see below"; status=1; tail -40 "$logs/diff.log"
    fi
    ;;
esac
case "$parts" in *soak*)
    if timeout 100 "$PYTHON" -m scripts.soak --device cuda >"$logs/soak.log" 2>&1; then
        soak_said=$(tail -1 "$logs/soak.log")
    else
        soak_said="failed"; status=1; tail -20 "$logs/soak.log"
    fi
    ;;
esac
case "$parts" in *bench*)
    wait "$maker"
    set -- --models "$models" --dir "$files" --time-limit "$bench_limit"
    [ -z "$only" ] || set -- "$@" --only "$only"
    if "$PYTHON" -m scripts.gpu_bench "$@" >"$logs/bench.log" 2>"$logs/bench.err"; then
        bench_said="done"
    else
        bench_said="incomplete"; status=1; tail -30 "$logs/bench.err"
    fi
    cat "$logs/bench.log"
    ;;
esac
echo "tests: $tests_said"
echo "diff:  $diff_said"
echo "soak:  $soak_said"
echo "bench: $bench_said"
exit $status
