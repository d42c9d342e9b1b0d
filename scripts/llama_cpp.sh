#!/usr/bin/env bash
# Installs llama.cpp (llama-cpp-python) into the virtual environment (.venv, or RLRC_VENV), built for this processor, and
# tries it. The first time takes minutes; after that pip has the wheel. More flags for CMake: CMAKE_ARGS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${RLRC_VENV:-.venv}
python=$venv/bin/python

say() { echo "llama.cpp: $*"; }
fail() { echo "llama.cpp: error: $*" >&2; exit 2; }
[ -x "$python" ] || fail "expected a virtual environment in $venv, found none; run make setup first"

# The library alone.
flags=(-DLLAVA_BUILD=OFF -DLLAMA_BUILD_{TOOLS,EXAMPLES,TESTS,SERVER}"=OFF" -DLLAMA_CURL=OFF)

# On x86-64 all that the processor has but AMX, whose kernels crash in the first quantized pass (llama-cpp-python 0.3.36):
# so instead of GGML_NATIVE every extension by its own flag.
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
    pip install -c constraints.txt "$@" 'llama-cpp-python>=0.3.36' gguf || fail "pip install failed; its last lines say why"
}
works() { "$python" scripts/llama_cpp_check.py; }

if works 2>/dev/null; then
    say "already there"
    exit 0
fi
say "installing llama-cpp-python; building it takes 10 minutes on 2 cores"
install
if ! works; then
    # pip keeps wheels by name and version alone: this one was built for another processor.
    say "the wheel that pip had does not work here; building it again"
    pip cache remove llama_cpp_python >/dev/null || true
    install --force-reinstall --no-deps
    works || fail "expected a build that runs on this processor, found that it does not; the lines above say why"
fi
say "done"
