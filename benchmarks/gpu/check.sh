#!/bin/sh
# Check on a CUDA machine what tests cannot: kernels, driver calls and engines on real hardware.
# It needs Linux, an NVIDIA GPU, and a python3 (3.10 or newer) with torch, triton, numpy,
# cuda-bindings, msgspec, psutil, pillow, safetensors and tokenizers. It needs no network and takes
# less than eight minutes.
# Wheels of missing packages may lie in .whl/ at the top of the checkout: `make gpu-wheels`.
#
#   sh benchmarks/gpu/check.sh [FILE.json]     # the record; by default benchmarks/results/gpu/NAME.json
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}
mkdir "$scratch/links"
ln -s "$root/export" "$scratch/links/crl_export"
ln -s "$root/benchmarks" "$scratch/links/crl_benchmarks"
PYTHONPATH="$root:$scratch/links${PYTHONPATH:+:$PYTHONPATH}"
for wheel in "$root"/.whl/*.whl; do
  if [ -e "$wheel" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/site" "$root"/.whl/*.whl
    PYTHONPATH="$PYTHONPATH:$scratch/site"
    break
  fi
done
export PYTHONPATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
cd "$root"
"$python" -m crl_benchmarks.gpu.check ${1:+--out "$1"}
