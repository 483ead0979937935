#!/usr/bin/env bash
# GPU tests and GPU benchmarks, from the bare tree, in under ten minutes: nothing is installed, PYTHONPATH points here.
#
#   bash benchmarks/gpu.sh                 JSON files and logs go to $OUT (default ./gpu-results)
#   PYTHON=… OUT=… bash benchmarks/gpu.sh
#
# A failing step does not stop the others. Exit status: 0 all passed, 1 something failed, 2 no GPU.
# To add a step, add a line to STEPS: name | seconds it may take | command. The seconds must add up to less than 600.
set -u

cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-./gpu-results}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

STEPS="
tests        | 150 | $PYTHON -m pytest -m gpu -q -p no:cacheprovider tests/numeric/test_on_gpu.py
gpu-linear   |  90 | $PYTHON benchmarks/gpu_linear.py --shapes 4096x4096 14336x4096 --batch 1 4 8 16 64 256 --sparsity 0.5 0.75 0.9 --seconds 55 --save \$OUT
gpu-tune     |  45 | $PYTHON benchmarks/gpu_linear.py --tune --shapes 4096x4096 --batch 1 8 --sparsity 0.75 --save \$OUT
gpu-decode   |  55 | $PYTHON benchmarks/gpu_decode.py --layers 8 --batch 1 8 --save \$OUT
layouts      |  25 | $PYTHON benchmarks/layouts.py --seconds 0.3 --rounds 51 --tokens 512 4096 --save \$OUT
train-small  |  40 | $PYTHON benchmarks/train_step.py --preset small --label small --seconds 8 --rounds 51 --save \$OUT
train-8b     |  65 | $PYTHON benchmarks/train_step.py --preset 8b --label 8b --methods floor s2ft paca rosa lora miss qrosa qlora --seconds 10 --rounds 31 --save \$OUT
train-7b     |  95 | $PYTHON benchmarks/train_step.py --preset 7b --label 7b --methods floor s2ft paca rosa full lora miss --compile --seconds 12 --rounds 31 --save \$OUT
compile-time |  30 | $PYTHON benchmarks/compile_time.py --widths 4096 --layers 4 8 --rounds 1 --save \$OUT
"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: no GPU here: $PYTHON cannot import torch, or torch.cuda.is_available() is false" >&2
    exit 2
fi

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OUT
"$PYTHON" - <<'PY' | tee "$OUT/machine.txt"
import importlib.metadata as m, torch
print(torch.cuda.get_device_name(), "| CUDA", torch.version.cuda)
for name in ("torch", "triton", "transformers", "peft", "pytest"):
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
    echo
    echo "=== $name (at most $limit s):$command"
    start=$SECONDS
    timeout --kill-after=10 "$limit" bash -c "$command" </dev/null >"$OUT/$name.log" 2>&1
    status=$?
    # the last line of a benchmark is its record, which is in its own file
    grep -v '^{"benchmark"' "$OUT/$name.log" | tail -n 40
    case $status in
        0) result=passed ;;
        5) if [ "$name" = tests ]; then result="passed (no GPU tests yet)"; else result="FAILED (exit 5)"; fi ;;
        124 | 137) result="FAILED (over $limit s)" ;;
        *) result="FAILED (exit $status)" ;;
    esac
    [ "${result#FAILED}" = "$result" ] || failed=$((failed + 1))
    summary+=$(printf '%-14s %4d s  %s' "$name" $((SECONDS - start)) "$result")$'\n'
done <<<"$STEPS"

echo
echo "=== summary, $SECONDS s"
printf '%s' "$summary" | tee "$OUT/summary.txt"
[ "$failed" -eq 0 ] || { echo "$failed failed; logs are in $OUT"; exit 1; }
