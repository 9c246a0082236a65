#!/usr/bin/env bash
# Everything that takes a GPU, on a machine with one and without a network, in one command:
#
#   bash bench/gpu.sh OUT [tests|micro|step|overhead|e2e|sanitize] [--dry]
#
# Without a stage: all of them, in this order. Each is stopped after 8 minutes (STAGE_SECONDS), counted from its start
# with nothing compiled; what it has written to OUT by then stays. OUT gets at most eight files: log.txt (what everything
# printed), tests.log, sanitize.log, one JSON file each of micro, step, overhead and pairs (the end-to-end stage), and
# table.txt, the targets beside what was measured, which is printed last. The JSON files are named as in bench/results/:
# copied there, `python -m bench results` puts them into bench/RESULTS.md.
#
# --dry runs the same code without a GPU: the reference ops, tiny decoders, nothing worth keeping.
# PYTHON names the interpreter (python3); this checkout is installed into it unless it already is.
set -uo pipefail

usage() { sed -n '4s/^#   //p' "$0" >&2; exit 2; }

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") && PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") || exit 1
LIMIT=${STAGE_SECONDS:-480}
ALL=(tests micro step overhead e2e sanitize)
DRY=0 OUT='' STAGES=()
for argument in "$@"; do
  case $argument in
    --dry) DRY=1 ;;
    -*) usage ;;
    *) if [[ -z $OUT ]]; then OUT=$argument
       elif [[ " ${ALL[*]} " == *" $argument "* ]]; then STAGES+=("$argument")
       else usage; fi ;;
  esac
done
[[ -n $OUT ]] || usage
(( ${#STAGES[@]} )) || STAGES=("${ALL[@]}")
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
cd "$ROOT" || exit 1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
LOG=$OUT/log.txt
BEGUN=$SECONDS

say() { echo "== $*" | tee -a "$LOG"; }

prepare() {
  "$PYTHON" -c 'import pytest, pytest_benchmark, pytest_timeout' 2>/dev/null ||
    { echo "$PYTHON lacks pytest, pytest-benchmark or pytest-timeout: pip install 'icon2_rt[test]'" >&2; exit 1; }
  # In a fresh place and without importing it: is it this checkout that this Python has?
  local here="import sys; from importlib.util import find_spec; sys.exit(not find_spec('icon2_rt').origin.startswith('$ROOT/'))"
  (cd / && "$PYTHON" -c "$here" 2>/dev/null) && return
  say "installing this checkout into $("$PYTHON" -c 'import sys; print(sys.prefix)')"
  "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e "$ROOT" 2>&1 | tee -a "$LOG"
}

# The watchdog's SIGTERM is 20 seconds ahead of the limit, its SIGKILL at the limit.
guarded() { timeout --signal=TERM --kill-after=20 $(( LIMIT > 40 ? LIMIT - 20 : LIMIT )) "$@"; }

# What a stage begins after so many seconds it would not finish.
inner() { echo $(( LIMIT > 120 ? LIMIT - 80 : LIMIT * 2 / 3 )); }

stage() {
  local dry=()
  (( DRY )) && dry=(--dry)
  case $1 in
    tests)
      # Most of the lane's time is compiling: in several processes, where pytest-xdist is there.
      local part=()
      "$PYTHON" -c 'import xdist' 2>/dev/null && (( ! DRY )) && part=(-n 6)
      (( DRY )) && export GPU_LANE_DEVICE=cpu && part=(-k '(test_steps and fp32) or test_reading or (test_kernels and odd and bfloat16) or (test_native and dry)')
      guarded "$PYTHON" -m pytest tests/gpu -q --durations=5 --timeout=240 "${part[@]}" 2>&1 | tee "$OUT/tests.log" ;;
    micro)
      local quick=(--benchmark-max-time=0.1 --benchmark-min-rounds=5)
      (( DRY )) && quick=(--benchmark-max-time=0.001 --benchmark-min-rounds=1 --benchmark-warmup=off -k 'copy or tiny-silu or tiny-1')
      BENCH_OUT=$OUT guarded "$PYTHON" -m pytest bench -q --benchmark-only --benchmark-columns=median,iqr,rounds \
        --benchmark-sort=fullname "${quick[@]}" 2>&1 ;;
    step | overhead)
      guarded "$PYTHON" -m bench "$1" --out "$OUT" --limit "$(inner)" "${dry[@]}" 2>&1 ;;
    e2e)
      local what=(--model llama3-8b --device cuda --new-tokens 128 --prompts 8 32 1 --repeats 3 --limit $(( LIMIT / 6 )))
      (( DRY )) && what=(--model dry --new-tokens 4 --prompts 1 8 --repeats 1 --limit 5)
      guarded "$PYTHON" -m bench pairs --out "$OUT" "${what[@]}" 2>&1 ;;
    sanitize)
      guarded "$PYTHON" -m bench sanitize --limit "$(inner)" "${dry[@]}" 2>&1 | tee "$OUT/sanitize.log" ;;
  esac
}

if (( ! DRY )) && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no CUDA GPU in $PYTHON; --dry runs the same code without one" >&2
  exit 2
fi
: >> "$LOG"
prepare
FAILED=()
for name in "${STAGES[@]}"; do
  say "$name, at most $LIMIT s"
  begun=$SECONDS
  stage "$name" | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  case $status in
    0) say "$name: done in $(( SECONDS - begun )) s" ;;
    124 | 137) say "$name: stopped by the watchdog after $(( SECONDS - begun )) s"; FAILED+=("$name") ;;
    *) say "$name: exit code $status after $(( SECONDS - begun )) s"; FAILED+=("$name") ;;
  esac
done
"$PYTHON" -m bench targets "$OUT" > "$OUT/table.txt"
say "$(( SECONDS - BEGUN )) s in all; ${#FAILED[@]} stage(s) failed: ${FAILED[*]:-none}"
cat "$OUT/table.txt"
exit $(( ${#FAILED[@]} > 0 ))
