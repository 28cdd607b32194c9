#!/usr/bin/env bash
# Checks and measures, on one CUDA GPU and in under 8 minutes, what no other machine can show:
#
#     bash scripts/check_gpu.sh OUTPUT_DIR [options of scripts/benchmarks/gpu.py]
#
# Runs tests/gpu, and scripts/benchmarks/gpu.py, which writes gpu.json and the table gpu.md to OUTPUT_DIR, beside the
# logs of both. The exit code is not 0 if a test fails; a measurement that fails is only recorded.
#
# Nothing is installed or downloaded. Besides torch with CUDA the machine needs transformers, accelerate, safetensors,
# huggingface_hub, lazy_loader, typer, Jinja2, PyYAML, matplotlib and pytest; not datasets and not evaluate. On a
# machine without network, bring what `python3 -c "import ..."` does not find as wheels. Elsewhere:
#
#     python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 -d wheels lazy_loader typer pytest
#
# and there, before this script:
#
#     python3 -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site
set -uo pipefail

out=${1:?usage: bash scripts/check_gpu.sh OUTPUT_DIR [options of scripts/benchmarks/gpu.py]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}

$python - <<'END' || exit 2
import importlib.util

import torch

names = "transformers accelerate safetensors huggingface_hub lazy_loader typer jinja2 yaml matplotlib pytest".split()
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    raise SystemExit(f"missing: {', '.join(missing)}. The head of scripts/check_gpu.sh says how to bring them.")
if not torch.cuda.is_available():
    raise SystemExit("torch finds no CUDA device here.")
print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
END

echo "== tests"
workers=()
$python -c "import xdist" 2>/dev/null && workers=(-n 4 --dist loadfile)
timeout 200 "$python" -m pytest tests/gpu -q -rfE -p no:cacheprovider -k "not [cpu" --durations 8 "${workers[@]}" \
    2>&1 | tee "$out/tests.log"
failed=${PIPESTATUS[0]}

echo "== measurements"
timeout 400 "$python" scripts/benchmarks/gpu.py "$out" "$@" 2>&1 | tee "$out/measurements.log"
echo "== tests ended with exit code $failed"
exit "$failed"
