#!/usr/bin/env bash
# Checks the TensorRT graphs of every family with NVIDIA's parser and builder (TensorRT-RTX, without a GPU), if its packages
# can be installed. They get a separate environment (.venv-tensorrt, or RLRC_TENSORRT_VENV), because they pin other versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${RLRC_VENV:-.venv}
own=${RLRC_TENSORRT_VENV:-.venv-tensorrt}

say() { echo "tensorrt: $*"; }
[ -x "$venv/bin/python" ] || { echo "tensorrt: error: expected a virtual environment in $venv, found none; run make setup" >&2; exit 2; }

if ! "$own/bin/python" -c 'import cuda.bindings, onnx, PIL, tensorrt_rtx_bindings, tokenizers, tyro' 2>/dev/null; then
    say "installing TensorRT-RTX into $own"
    "$venv/bin/python" -m venv "$own"
    if ! "$own/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt \
        cuda-bindings numpy onnx pillow rich tokenizers tyro tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs; then
        say "not checked: the TensorRT-RTX packages cannot be installed"
        exit 0
    fi
fi
RLRC_TENSORRT_PYTHON=$(realpath -s "$own/bin/python") "$venv/bin/python" -m pytest -q -m "slow or not slow" tests/test_jetson_check.py
