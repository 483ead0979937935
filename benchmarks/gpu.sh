#!/usr/bin/env bash
# GPU tests and GPU benchmarks, from the bare tree, in under ten minutes: nothing is installed, PYTHONPATH points here.
#
#   bash benchmarks/gpu.sh                 JSON files and logs go to $OUT (default ./gpu-results)
#   PYTHON=… OUT=… bash benchmarks/gpu.sh
#   STEPS_ONLY="tests gpu-linear" …        these steps only
#   DRY=1 …                                every step on the CPU with tiny sizes, to see that it runs
#
# A failing step does not stop the others, and benchmarks save what they have measured as they go (NAME.partial.json).
# Exit status: 0 all passed, 1 something failed, 2 no GPU.
# To add a step, add a line to STEPS: name | seconds it may take | command. The seconds must add up to less than 600; no step
# begins or goes on beyond DEADLINE seconds.
set -u

cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-./gpu-results}
PYTHON=${PYTHON:-python3}
DEADLINE=${DEADLINE:-585}
DRY=${DRY:-}
STEPS_ONLY=${STEPS_ONLY:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PARALLEL=""
[ -z "$DRY" ] && "$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL="-n 6"

# What each measures of the bars: tests, correctness against fp64; gpu-roofline, 80 % of the format's roofline at batch 1;
# gpu-linear, over dense for batch 1 to 16, and large batches; gpu-quantized, one pass over packed bases; gpu-decode, tokens per
# second; train-8b, RoSA, QRoSA and S2FT against PEFT, long sequence; train-7b, S2FT against full and the frozen floor;
# train-compiled, the same compiled. Methods over NF4 need bitsandbytes, and are left out with that reason where it is missing.
STEPS="
tests          | 110 | $PYTHON -m pytest -m gpu -vv --tb=short $PARALLEL -p no:cacheprovider --junitxml=\$OUT/tests.xml tests/numeric/test_on_gpu.py
gpu-roofline   |  50 | $PYTHON benchmarks/gpu_linear.py --label roofline --shapes 4096x4096 14336x4096 4096x14336 --batch 1 --sparsity 0.5 0.6 0.7 0.75 0.8 0.9 --seconds 30 --save \$OUT
gpu-linear     |  65 | $PYTHON benchmarks/gpu_linear.py --shapes 4096x4096 14336x4096 --batch 1 4 8 16 64 256 --sparsity 0.5 0.75 0.9 --seconds 42 --save \$OUT
gpu-quantized  |  45 | $PYTHON benchmarks/gpu_quantized.py --shapes 4096x4096 14336x4096 --batch 1 4 16 64 --seconds 25 --save \$OUT
gpu-decode     |  50 | $PYTHON benchmarks/gpu_decode.py --layers 8 --batch 1 8 --save \$OUT
train-8b       |  65 | $PYTHON benchmarks/train_step.py --preset 8b --label 8b --sequence 2048 --batch 1 --methods floor s2ft lora rosa paca miss qrosa qlora --build-seconds 35 --seconds 10 --rounds 31 --save \$OUT
train-7b       |  55 | $PYTHON benchmarks/train_step.py --preset 7b --label 7b --methods floor floor_cut s2ft lora full paca rosa miss --build-seconds 30 --seconds 10 --rounds 31 --save \$OUT
train-compiled | 100 | $PYTHON benchmarks/train_step.py --preset 7b --label compiled --layers 2 --methods floor s2ft lora paca rosa miss full --no-eager --build-seconds 70 --seconds 8 --rounds 31 --save \$OUT
gpu-tune       |  25 | $PYTHON benchmarks/gpu_linear.py --tune --shapes 4096x4096 --batch 1 8 --sparsity 0.75 --save \$OUT
layouts        |  15 | $PYTHON benchmarks/layouts.py --seconds 0.2 --rounds 31 --tokens 512 4096 --save \$OUT
"

if [ -z "$DRY" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: no GPU here: $PYTHON cannot import torch, or torch.cuda.is_available() is false (DRY=1 for the CPU)" >&2
    exit 2
fi

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OUT
"$PYTHON" - <<'PY' | tee "$OUT/machine.txt"
import importlib.metadata as m, torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "| CUDA", torch.version.cuda)
for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "numpy", "pytest"):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, "missing")
PY

failed=0
summary=""
while IFS='|' read -r name limit command; do
    name=${name//[[:space:]]/}
    [ -z "$name" ] && continue
    limit=${limit//[[:space:]]/}
    [ -n "$STEPS_ONLY" ] && [[ " $STEPS_ONLY " != *" $name "* ]] && continue
    [ -n "$DRY" ] && [ "$name" != tests ] && command="$command --fast --device cpu"
    left=$((DEADLINE - SECONDS))
    if [ "$left" -lt 10 ]; then
        summary+=$(printf '%-14s %4d s  %s' "$name" 0 "SKIPPED (no time left)")$'\n'
        failed=$((failed + 1))
        continue
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo
    echo "=== $name (at most $limit s):$command"
    start=$SECONDS
    timeout --kill-after=5 "$limit" bash -c "$command" </dev/null >"$OUT/$name.log" 2>&1
    status=$?
    # the last line of a benchmark is its record, which is in its own file
    grep -v '^{"benchmark"' "$OUT/$name.log" | tail -n 40
    case $status in
        0) result=passed ;;
        124 | 137) result="FAILED (over $limit s)" ;;
        *) result="FAILED (exit $status)" ;;
    esac
    [ "${result#FAILED}" = "$result" ] || failed=$((failed + 1))
    summary+=$(printf '%-14s %4d s  %s' "$name" $((SECONDS - start)) "$result")$'\n'
    printf '%s' "$summary" >"$OUT/summary.txt"
done <<<"$STEPS"

echo
echo "=== summary, $SECONDS s"
printf '%s' "$summary" | tee "$OUT/summary.txt"
[ "$failed" -eq 0 ] || { echo "$failed failed; logs are in $OUT"; exit 1; }
