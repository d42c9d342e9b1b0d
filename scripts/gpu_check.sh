#!/usr/bin/env bash
# Checks the stages and the TensorRT backend on one NVIDIA GPU, in at most 8 minutes, and writes the results as JSON.
#
#   bash scripts/gpu_check.sh OUT.json [--device cuda|cpu] [--seconds 480]
#
# Needs a Python with PyTorch's CUDA build and rlrc's other requirements (RLRC_GPU_PYTHON, default: python3), no network
# and no simulator. TensorRT, pytest and the simulator are used if they are installed, and reported as left out if not.
set -euo pipefail
out=$(realpath -m "${1:?expected the file for the results}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD/compressor:$PWD/exporters:$PWD/runtime:$PWD/benchmarks:$PWD/jetson:$PWD/benchmarks/studies:$PWD/tests"
exec "${RLRC_GPU_PYTHON:-python3}" scripts/gpu_check.py "$out" "$@"
