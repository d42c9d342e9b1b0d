#!/usr/bin/env bash
# Checks llama.cpp on 64-bit Arm in the emulator of aarch64_check.sh. Cross-compiles the source from pip for a Jetson Orin
# (about ten minutes on one core), then compares the outputs of GGUF graphs with those on this machine: the reference
# policy, OpenVLA and OpenVLA-OFT in fp32; OpenVLA-OFT with continuous actions also in int4. Needs make gguf and make
# aarch64-check. The result is written to RLRC_RESULT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "${RLRC_VENV:-.venv}")/bin/python
own=$(realpath -sm "${RLRC_AARCH64:-.aarch64}")
build=$own/llama.cpp
site=$own/site-llama
result=${RLRC_RESULT:-$own/aarch64_gguf.json}
most=${RLRC_MOST:-16}
version=$(sed -n 's/^llama-cpp-python==//p' constraints.txt)
export OMP_NUM_THREADS=1
sources=$PWD/compressor:$PWD/exporters:$PWD/runtime:$PWD/benchmarks:$PWD/jetson

say() { echo "llama.cpp on aarch64: $*"; }
fail() { echo "llama.cpp on aarch64: error: $*" >&2; exit 2; }
pip() { "$python" -m pip --disable-pip-version-check -q "$@"; }
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
if [ -z "$qemu" ] || [ ! -e "$own/root/usr/bin/python3" ]; then
    fail "expected an emulator with a root file system, found none; run make aarch64-check"
fi
"$python" -c 'import gguf, llama_cpp' 2>/dev/null || fail "expected llama-cpp-python here, found none; run make gguf"

if ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    say "installing the cross compiler"
    sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    "${sudo[@]}" apt-get update -qq || say "apt-get update failed; using the existing package lists"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends g++-aarch64-linux-gnu >/dev/null || fail "g++-aarch64-linux-gnu cannot be installed"
fi

if [ ! -e "$build/bin/libllama.so" ]; then
    [ -x "$own/tools/bin/ninja" ] || { "$python" -m venv "$own/tools" && "$own/tools/bin/pip" install -q cmake ninja; }
    mkdir -p "$build/source"
    pip download --no-deps --no-binary=llama-cpp-python -d "$build" "llama-cpp-python==$version" ||
        fail "the source of llama-cpp-python $version does not download"
    tar -xf "$build"/llama_cpp_python-*.tar.gz -C "$build/source" --strip-components=1
    "$own/tools/bin/cmake" -G Ninja "-DCMAKE_MAKE_PROGRAM=$own/tools/bin/ninja" -S "$build/source/vendor/llama.cpp" \
        -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DBUILD_SHARED_LIBS=ON \
        -DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16 -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_{COMMON,TOOLS,EXAMPLES,TESTS,SERVER}=OFF >"$build/cmake.log" || fail "see $build/cmake.log"
    say "compiling"
    "$own/tools/bin/ninja" -C "$build" llama || fail "llama.cpp does not compile"
fi

# The Python package of llama-cpp-python, laid out as in a wheel.
if [ ! -e "$site/llama_cpp/lib/libllama.so" ]; then
    mkdir -p "$site/llama_cpp/lib" "$site/llama_cpp_python-$version.dist-info"
    cp -r "$build"/source/llama_cpp/. "$site/llama_cpp/"
    cp "$build"/bin/lib{llama,ggml,ggml-base,ggml-cpu}.so* "$site/llama_cpp/lib/"
    printf 'Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: %s\n' "$version" \
        >"$site/llama_cpp_python-$version.dist-info/METADATA"
    pip install --target "$site" --no-deps -c constraints.txt diskcache typing-extensions
    "$python" scripts/pip_as.py 3.11.2 aarch64 install -q --target "$site" -c constraints.txt jinja2
fi

rm -rf "$own/artifacts-gguf"
mkdir -p "$own/artifacts-gguf"
PYTHONPATH=$sources "$python" scripts/aarch64_artifacts.py "$own/artifacts-gguf" gguf || fail "the export failed"
mapfile -t artifacts < <(find "$own/artifacts-gguf" -mindepth 1 -maxdepth 1 -not -name weights | sort)
PYTHONPATH=$own/native:$sources "$python" scripts/replay.py "$own/x86_64-gguf" "${artifacts[@]}" --backend gguf \
    --most "$most" >/dev/null || fail "the replay on this machine failed"
"$qemu" -L "$own/root" -E PYTHONPATH="$site:$own/site:$PWD/runtime" "$own/root/usr/bin/python3" scripts/replay.py \
    "$own/aarch64-gguf" "${artifacts[@]}" --backend gguf --most "$most" --against "$own/x86_64-gguf" ||
    fail "the replay in the emulator failed"
PYTHONPATH=$sources "$python" scripts/aarch64_result.py "bash scripts/aarch64_llama_cpp.sh" "$own/x86_64-gguf" \
    "$own/aarch64-gguf" "$("$qemu" --version | head -n 1)" none "$result"
