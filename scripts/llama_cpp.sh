#!/usr/bin/env bash
# Builds llama.cpp (llama-cpp-python) for this processor, installs it into the virtual environment (.venv, or RLRC_VENV)
# and tests it. The first build takes minutes; pip caches the wheel. CMAKE_ARGS adds flags for CMake.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${RLRC_VENV:-.venv}
python=$venv/bin/python

say() { echo "llama.cpp: $*"; }
fail() { echo "llama.cpp: error: $*" >&2; exit 2; }
[ -x "$python" ] || fail "expected a virtual environment in $venv, found none; run make setup first"

# Build only the library.
flags=(-DLLAVA_BUILD=OFF -DLLAMA_BUILD_{TOOLS,EXAMPLES,TESTS,SERVER}"=OFF" -DLLAMA_CURL=OFF)

# GGML_NATIVE would enable AMX, whose kernels crash in the first quantized pass (llama-cpp-python 0.3.36). On x86-64, enable
# every other extension of the processor by its flag instead.
has() { grep -qm1 "^flags.*[[:space:]]$1\b" /proc/cpuinfo; }
if [ "$(uname -m)" = x86_64 ]; then
    flags+=(-DGGML_NATIVE=OFF)
    while read -r extension flag; do
        if has "$extension"; then flags+=("-DGGML_$flag=ON"); else flags+=("-DGGML_$flag=OFF"); fi
    done <<'END'
sse4_2 SSE42
avx AVX
avx2 AVX2
f16c F16C
fma FMA
bmi2 BMI2
avx_vnni AVX_VNNI
avx512bw AVX512
avx512vbmi AVX512_VBMI
avx512_vnni AVX512_VNNI
avx512_bf16 AVX512_BF16
END
fi
export CMAKE_ARGS="${flags[*]} ${CMAKE_ARGS:-}"
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
install() {
    pip install -c constraints.txt "$@" 'llama-cpp-python>=0.3.36' gguf || fail "pip install failed; see its last lines"
}
works() { "$python" scripts/llama_cpp_check.py; }

if works 2>/dev/null; then
    say "already installed"
    exit 0
fi
say "installing llama-cpp-python; building it takes 10 minutes on 2 cores"
install
if ! works; then
    # pip caches wheels by name and version only: this one was built for another processor.
    say "the cached wheel does not work on this processor; rebuilding"
    pip cache remove llama_cpp_python >/dev/null || true
    install --force-reinstall --no-deps
    works || fail "expected a build that runs on this processor, found that it does not; see the lines above"
fi
say "done"
