#!/usr/bin/env bash
# Everything that takes a GPU, on a machine with one and without a network, in one command:
#
#   bash bench/gpu.sh OUT [prepare|qualify|tests|micro|step|overhead|crossover|e2e|sanitize] [--dry]
#
# Without a stage: all of them, in this order. "prepare" comes first whatever is asked for: it makes this checkout
# importable in PYTHON (python3), in 180 s at most (PREPARE_SECONDS), and does nothing where it is already. Each other
# stage ends within 400 s (STAGE_SECONDS) with nothing compiled before it, begins with what is worth most, and is useful
# alone; one that is stopped keeps what it has written. A call with one stage so fits 10 minutes, and later calls add to
# the same OUT.
#
# OUT gets log.txt (what everything printed), tests*.log, sanitize.log, one JSON file for each of qualify, micro, step,
# overhead, crossover and pairs (the end-to-end stage), and table.txt, the targets beside what was measured, which is
# printed last. The JSON files are named as in bench/results/: copied there, `python -m bench results` puts them into
# bench/RESULTS.md.
#
# It needs torch with CUDA, its Triton and transformers; pytest for "tests", pytest-benchmark too for "micro". Without
# one of these its stages fail and say so, the others run. --dry runs the same code without a GPU: the reference ops,
# tiny decoders, nothing worth keeping.
set -uo pipefail

usage() { sed -n '4s/^#   //p' "$0" >&2; exit 2; }

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") && PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") || exit 1
LIMIT=${STAGE_SECONDS:-400}
PREPARE=${PREPARE_SECONDS:-180}
LANE=${GPU_LANE:-tests/gpu}
ALL=(prepare qualify tests micro step overhead crossover e2e sanitize)
DRY=0 OUT='' STAGES=()
for argument in "$@"; do
  case $argument in
    --dry) DRY=1 ;;
    -*) usage ;;
    *) if [[ -z $OUT ]]; then OUT=$argument
       elif [[ " ${ALL[*]} " == *" $argument "* ]]; then [[ $argument == prepare ]] || STAGES+=("$argument"); ASKED=1
       else usage; fi ;;
  esac
done
[[ -n $OUT ]] || usage
[[ -n ${ASKED:-} ]] || STAGES=("${ALL[@]:1}")
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
cd "$ROOT" || exit 1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
LOG=$OUT/log.txt
BEGUN=$SECONDS

say() { echo "== $*" | tee -a "$LOG"; }

# ---------------------------------------------------------------- prepare

# Is it this checkout that this Python has, seen from another folder? Looked up and not imported, which takes a while.
installed() {
  local here="import sys; from importlib.util import find_spec; sys.exit(not find_spec('icon2_rt').origin.startswith('$ROOT/'))"
  (cd / && "$PYTHON" -c "$here" 2> /dev/null)
}

# pip within $1 seconds, with the environment of the other arguments.
install() {
  local seconds=$1; shift
  env "$@" timeout --kill-after=5 "$seconds" \
    "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e "$ROOT" 2>&1 | tail -n 20 | tee -a "$LOG"
  local status=${PIPESTATUS[0]}
  case $status in
    0) installed ;;
    124 | 137) say "prepare: pip was stopped after $seconds s"; return 1 ;;
    *) say "prepare: pip's exit code is $status"; return 1 ;;
  esac
}

# Four ways, each with less: the native extension with its CUDA part; its CPU part alone; pure Python; and the checkout
# as it lies, where pip does not work at all.
prepare() {
  local begun=$SECONDS how
  installed && return
  [[ -e icon2_rt/kernels/__init__.py ]] && return  # an earlier run's link
  say "prepare: $("$PYTHON" -c 'import sys; print(sys.prefix)'), at most $PREPARE s"
  if install $(( PREPARE * 2 / 3 )) ICON2_NATIVE=1; then how="this checkout is installed"
  elif install $(( PREPARE * 2 / 9 )) ICON2_CUDA=0; then how="this checkout is installed, without CUDA C++"
  elif install $(( PREPARE / 9 )) ICON2_NATIVE=0; then how="this checkout is installed, in pure Python"
  elif ln -sfn ../kernels icon2_rt/kernels && "$PYTHON" -c 'import icon2_rt.kernels' 2>&1 | tee -a "$LOG"; then
    how="nothing is installed, it runs in the checkout"
  else say "prepare: neither pip nor a link makes this checkout importable in $PYTHON"; return 1
  fi
  say "prepare: done in $(( SECONDS - begun )) s: $how"
}

# ---------------------------------------------------------------- stages

# The watchdog's SIGTERM is 20 seconds ahead of the limit, its SIGKILL at the limit. $1: seconds that are gone already.
guarded() {
  local left=$(( LIMIT - $1 )); shift
  (( left > 40 )) && left=$(( left - 20 ))
  (( left > 0 )) || return 124
  timeout --signal=TERM --kill-after=20 "$left" "$@"
}

# What a stage begins after so many seconds it would not finish.
inner() { echo $(( LIMIT > 120 ? LIMIT - 80 : LIMIT * 2 / 3 )); }

# Does pytest have this option, of a plugin that may be missing?
has() { [[ ${PYTEST_HELP:=$("$PYTHON" -m pytest -c /dev/null --noconftest --help 2>&1)} == *"$1"* ]]; }

# The project's own settings name an option of pytest-timeout, which --strict-config refuses where that is missing.
PYTEST=(-m pytest -q -o 'addopts=--import-mode=importlib --strict-markers')

# One pytest process over $2 …, everything it prints in $1. After a CUDA fault another one goes on behind it.
lane() {
  local log=$1 begun=$SECONDS status worst=0; shift
  # Where one hangs is told without pytest-timeout too.
  local options=(-ra --durations=5 --maxfail=10 -o faulthandler_timeout=120)
  has --timeout= && options+=(--timeout=240)
  : > "$log"
  rm -f "$log.begun"
  for _ in 1 2 3 4; do
    GPU_LANE_BEGUN=$log.begun guarded $(( SECONDS - begun )) "$PYTHON" "${PYTEST[@]}" "${options[@]}" "$@" > "$log.new" 2>&1
    status=$?
    cat "$log.new" >> "$log"
    (( status == 5 )) || worst=$(( status > worst ? status : worst ))  # 5: nothing is left behind the fault
    grep -q '^!.*CUDA fault' "$log.new" || break
  done
  rm -f "$log.new" "$log.begun"
  return "$worst"
}

# Most of the lane's time is compiling, and a fault ends a process: a file is a process of its own, six at a time.
lanes() {
  local file log at_once=6 worst=0 status logs=() ids=()
  [[ $(nvidia-smi --query-gpu=compute_mode --format=csv,noheader 2> /dev/null) == Exclusive* ]] && at_once=1
  for file in "$LANE"/test_*.py; do
    while (( $(jobs -rp | wc -l) >= at_once )); do wait -n; done
    log=$(basename "$file" .py)
    log=$OUT/tests-${log#test_}.log
    logs+=("$log")
    lane "$log" "$file" &
    ids+=($!)
  done
  for id in "${ids[@]}"; do
    wait "$id"; status=$?
    worst=$(( status > worst ? status : worst ))
  done
  for log in "${logs[@]}"; do echo "-- $(basename "$log")"; tail -n 40 "$log"; done
  return "$worst"
}

stage() {
  local dry=()
  (( DRY )) && dry=(--dry)
  case $1 in
    qualify)
      # One trial takes 240 s at most, and ends its own process; so a later one begins in the first third or not at all.
      guarded 0 "$PYTHON" -m bench qualify --out "$OUT" --limit $(( LIMIT / 3 )) "${dry[@]}" 2>&1 ;;
    tests)
      has --maxfail= || { echo "$PYTHON lacks pytest: pip install 'icon2_rt[test]'"; return 1; }
      (( DRY )) && export GPU_LANE_DEVICE=cpu
      if (( DRY )) && [[ $LANE == tests/gpu ]]; then  # some of each kind, in one process
        lane "$OUT/tests.log" "$LANE" -k '(test_steps and fp32) or test_reading or (test_kernels and odd and bfloat16) or (test_native and dry)'
        local status=$?
        cat "$OUT/tests.log"
        return "$status"
      fi
      lanes ;;
    micro)
      has --benchmark-only || { echo "$PYTHON lacks pytest-benchmark: pip install 'icon2_rt[test]'"; return 1; }
      local quick=(--benchmark-max-time=0.1 --benchmark-min-rounds=5)
      (( DRY )) && quick=(--benchmark-max-time=0.001 --benchmark-min-rounds=1 --benchmark-warmup=off -k 'copy or tiny-silu or tiny-1')
      BENCH_OUT=$OUT guarded 0 "$PYTHON" "${PYTEST[@]}" bench --benchmark-only --benchmark-columns=median,iqr,rounds \
        --benchmark-sort=fullname "${quick[@]}" 2>&1 ;;
    step | overhead)
      guarded 0 "$PYTHON" -m bench "$1" --out "$OUT" --limit "$(inner)" "${dry[@]}" 2>&1 ;;
    crossover)
      guarded 0 "$PYTHON" -m bench crossover --out "$OUT" --limit "$(inner)" --seconds 1.5 "${dry[@]}" 2>&1 ;;
    e2e)
      local what=(--model auto --device cuda --new-tokens 128 --prompts 8 32 1 --repeats 3 --limit $(( LIMIT / 6 )))
      (( DRY )) && what=(--model dry --new-tokens 4 --prompts 1 8 --repeats 1 --limit 5)
      guarded 0 "$PYTHON" -m bench pairs --out "$OUT" "${what[@]}" 2>&1 ;;
    sanitize)
      guarded 0 "$PYTHON" -m bench sanitize --limit "$(inner)" "${dry[@]}" 2>&1 | tee "$OUT/sanitize.log" ;;
  esac
}

if (( ! DRY )) && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no CUDA GPU in $PYTHON; --dry runs the same code without one" >&2
  exit 2
fi
: >> "$LOG"
prepare || exit 1
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
