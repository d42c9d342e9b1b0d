#!/usr/bin/env bash
# Checks the robot side for 64-bit Arm on another machine: whether pip finds wheels of all requirements for the Pythons of
# JetPack 6 and 7, and whether the runtime gives the same results. The latter runs in an emulator (QEMU, one process, no
# container) with Debian's Python for arm64 and wheels for aarch64, all in the folder .aarch64 (or RLRC_AARCH64). The
# result is written to RLRC_RESULT (default: a file in that folder).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -s "${RLRC_VENV:-.venv}")
python=$venv/bin/python
own=$(realpath -sm "${RLRC_AARCH64:-.aarch64}")
result=${RLRC_RESULT:-$own/aarch64.json}
onnxruntime=1.23.2 # later releases crash at import on every processor model of QEMU 7.2
export OMP_NUM_THREADS=1
sources=$PWD/compressor:$PWD/exporters:$PWD/runtime:$PWD/benchmarks:$PWD/jetson

say() { echo "aarch64: $*"; }
fail() { echo "aarch64: error: $*" >&2; exit 2; }
[ -x "$python" ] || fail "expected a virtual environment in $venv, found none; run make setup"
mkdir -p "$own"

# Runs a command only if the files that it depends on have changed: once NAME FILES... -- COMMAND...
once() {
    local name=$1 files=() print
    shift
    while [ "$1" != -- ]; do files+=("$1"); shift; done
    shift
    print=$({ find "${files[@]}" -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum; pwd; } | sha256sum)
    [ "$(cat "$own/$name.done" 2>/dev/null)" != "$print" ] || return 0
    "$@"
    echo "$print" >"$own/$name.done"
}

# 1. Requirements

pip_as() { "$python" scripts/pip_as.py "$@"; }

resolve() {
    local wheel target machine version reports=()
    rm -rf "$own/dist"
    "$python" -m pip wheel --disable-pip-version-check -q --no-deps -w "$own/dist" . || fail "the wheel does not build"
    wheel=$(echo "$own"/dist/rlrc-*.whl)
    for target in aarch64-3.10.12 aarch64-3.11.2 aarch64-3.12.3 x86_64-3.10.12; do
        machine=${target%-*} version=${target#*-}
        pip_as "$version" "$machine" install --disable-pip-version-check -q --dry-run --ignore-installed \
            --target "$own/nowhere" -c constraints.txt --report "$own/$target.json" "${wheel}[cpu,data,serve]" ||
            fail "the requirements do not resolve for Python $version on $machine"
        reports+=("$own/$target.json")
        say "Python $version on $machine: found wheels of all requirements of rlrc[cpu,data,serve]"
    done
    "$python" - "${reports[@]}" >"$own/resolved.json" <<'END'
import json, pathlib, sys
compiled = {"aiohttp", "av", "msgpack", "numpy", "onnxruntime", "pillow", "pyarrow", "tokenizers", "websockets"}
resolved = {}
for path in map(pathlib.Path, sys.argv[1:]):
    packages = [entry["metadata"] for entry in json.loads(path.read_text())["install"]]
    versions = {package["name"]: package["version"] for package in packages if package["name"] in compiled}
    machine, python = path.stem.split("-")
    resolved[f"Python {python} on {machine}"] = {"packages": len(packages) - 1, **versions}  # without rlrc
print(json.dumps(resolved))
END
}
once resolve pyproject.toml constraints.txt scripts/pip_as.py scripts/aarch64_check.sh -- resolve

# 2. The emulator and its root file system

if [ "$(uname -m)" = aarch64 ]; then
    say "not emulated: this machine is 64-bit Arm; run rlrc verify on an artifact instead"
    exit 0
fi

emulator() {
    command -v qemu-aarch64-static || command -v qemu-aarch64
}
if ! emulator >/dev/null; then
    say "installing qemu-user-static"
    sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    log=$own/apt.log
    "${sudo[@]}" apt-get update -qq >"$log" 2>&1 || say "apt-get update failed; using the existing package lists"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-user-static \
        >"$log" 2>&1 || fail "expected QEMU's user mode, found none, and apt-get install qemu-user-static failed; see $log"
fi
qemu=$(emulator)
root=$own/root

unpack_root() {
    local apt=$own/apt options package
    rm -rf "$root" "$apt"
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    options=(-qq -o "APT::Architecture=arm64" -o "APT::Architectures=arm64" -o "Dir::State::Lists=$apt/lists"
        -o "Dir::State::status=/dev/null" -o "Dir::Cache=$apt/cache" -o "Debug::NoLocking=1")
    say "fetching Python for arm64"
    apt-get "${options[@]}" update && apt-get "${options[@]}" install -y --download-only --no-install-recommends \
        python3 libstdc++6 || return
    for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$root"; done
    rm -rf "$apt"
}
if [ ! -e "$root/usr/bin/python3" ] && ! unpack_root >"$own/apt.log" 2>&1; then
    say "not emulated: this system's archive has no packages for arm64 (see $own/apt.log)"
    exit 0
fi
emulated() { "$qemu" -L "$root" -E PYTHONPATH="$own/site:$PWD/runtime" "$root/usr/bin/python3" "$@"; }
version=$(emulated -c 'import platform; print(platform.python_version())') || fail "Python does not run in $qemu"

install_wheels() {
    local wheel
    wheel=$(echo "$own"/dist/rlrc-*.whl)
    sed "s/^onnxruntime==.*/onnxruntime==$onnxruntime/" constraints.txt >"$own/constraints.txt"
    rm -rf "$own/site" "$own/native"
    pip_as "$version" aarch64 install --disable-pip-version-check -q --target "$own/site" \
        -c "$own/constraints.txt" "${wheel}[cpu]" || fail "the wheels for aarch64 cannot be installed"
    # Install the same release for this machine, so that only the machine differs.
    "$python" -m pip install --disable-pip-version-check -q --target "$own/native" --no-deps "onnxruntime==$onnxruntime" ||
        fail "onnxruntime $onnxruntime cannot be installed"
    rm -rf "$own/site/rlrc" # the checkout is used instead
}
once wheels pyproject.toml constraints.txt scripts/pip_as.py scripts/aarch64_check.sh -- install_wheels

# 3. The same observations on both machines

export_artifacts() {
    rm -rf "$own/artifacts"
    mkdir -p "$own/artifacts"
    say "exporting the reference policy and the golden checkpoints in fp32, int4 and int8"
    PYTHONPATH=$sources "$python" scripts/aarch64_artifacts.py "$own/artifacts" || fail "the export failed"
}
once artifacts compressor exporters runtime reference tests/data tests/families.py scripts/aarch64_artifacts.py -- \
    export_artifacts
mapfile -t artifacts < <(find "$own/artifacts" -mindepth 1 -maxdepth 1 -not -name weights | sort)
PYTHONPATH=$own/native:$sources "$python" scripts/replay.py "$own/x86_64" "${artifacts[@]}" --most "${RLRC_MOST:-16}" \
    >/dev/null || fail "the replay on this machine failed"
emulated scripts/replay.py "$own/aarch64" "${artifacts[@]}" --most "${RLRC_MOST:-16}" --against "$own/x86_64" ||
    fail "the replay in the emulator failed"
PYTHONPATH=$sources "$python" scripts/aarch64_result.py "make aarch64-check" "$own/x86_64" "$own/aarch64" \
    "$("$qemu" --version | head -n 1)" "$own/resolved.json" "$result" || exit
say "all artifacts are within their limits; see ${result#"$PWD/"} for the differences between the machines"
