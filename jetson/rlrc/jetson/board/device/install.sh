#!/usr/bin/env bash
# Installs rlrc on this Jetson: JetPack's packages, a user, a virtual environment, engines with CUDA, services.
#
#   sudo bash install.sh [check] [packages] [user] [python] [onnxruntime] [llama] [service] [doctor]
#
# Without names all of them, in this order. Every stage can be run again: what is there already stays as it is. The files
# R36.env and the like beside this one say what each release of Jetson Linux has; rlrc jetson install writes them.
# DESTDIR=FOLDER puts the files of the stage service there instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=${DESTDIR:-}
home=/opt/rlrc
own=$home/venv/bin/python

say() { echo "install: $*"; }
fail() { echo "install: error: $*" >&2; exit 2; }

# PACKAGE, and of this release JETPACK UBUNTU PYTHON CUDA WHEELS
# shellcheck source=/dev/null
source ./package.env
release=$(sed -nE 's/^# R([0-9]+) \(release\).*/R\1/p' /etc/nv_tegra_release 2>/dev/null || true)
if [ -n "$release" ] && [ -f "$release.env" ]; then
    # shellcheck source=/dev/null
    source "./$release.env"
fi

check() {
    [ "$(uname -m)" = aarch64 ] || fail "expected a Jetson (aarch64), found $(uname -m); run this on the board"
    [ "$(id -u)" = 0 ] || fail "expected root, found $(id -un); run sudo bash install.sh"
    [ -n "$release" ] || fail "expected Jetson Linux, found no /etc/nv_tegra_release; flash the board with JetPack"
    [ -f "$release.env" ] || fail "expected one of $(echo R*.env), found $release; update rlrc, or flash another JetPack"
    # shellcheck source=/dev/null
    [ "$(. /etc/os-release && echo "$VERSION_ID")" = "$UBUNTU" ] || fail "expected Ubuntu $UBUNTU of JetPack $JETPACK, found another"
    [ "$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$PYTHON" ] ||
        fail "expected /usr/bin/python3 to be $PYTHON, found $(/usr/bin/python3 -V); link it back"
    local target
    target=$(sm)
    say "JetPack $JETPACK ($release), Ubuntu $UBUNTU, Python $PYTHON, CUDA $CUDA, SM $target"
}

# The compute capability that CUDA code is compiled for: Orin is tegra234, Thor tegra264.
sm() {
    case "$(tr '\0' ' ' </proc/device-tree/compatible 2>/dev/null)" in
        *tegra264*) echo 110 ;;
        *tegra234*) echo 87 ;;
        *) fail "expected an Orin or a Thor, found another board" ;;
    esac
}

packages() {
    local wanted=(python3-venv python3-dev build-essential cmake ninja-build v4l-utils logrotate) missing=() name
    # The driver comes with Jetson Linux; CUDA, cuDNN and TensorRT with this one.
    if [ ! -x /usr/local/cuda/bin/nvcc ] || ! ls /usr/lib/aarch64-linux-gnu/libnvinfer.so.* >/dev/null 2>&1; then
        wanted+=(nvidia-jetpack)
    fi
    for name in "${wanted[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
    done
    if [ ${#missing[@]} = 0 ]; then say "packages are there"; return; fi
    say "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

user() {
    getent passwd rlrc >/dev/null || useradd --system --user-group --home-dir /var/lib/rlrc --shell /usr/sbin/nologin rlrc
    local name
    for name in video render dialout input; do # the units name them, so they have to be there
        getent group "$name" >/dev/null || groupadd --system "$name"
    done
    for name in video render dialout input gpio i2c; do
        if getent group "$name" >/dev/null; then usermod -aG "$name" rlrc; fi
    done
    # Whoever deploys is in the group rlrc: sudo usermod -aG rlrc NAME
    install -d -o rlrc -g rlrc -m 2775 /var/lib/rlrc /var/log/rlrc
    install -d -m 755 /etc/rlrc $home
    say "user rlrc and its folders are there"
}

# With the system's packages, for TensorRT's module is made for the system's Python.
python() {
    if ! $own -c 'import pip' 2>/dev/null; then /usr/bin/python3 -m venv --system-site-packages $home/venv; fi
    pip install "$PACKAGE"
    # A wheel of the same version may be another one.
    case "$PACKAGE" in *.whl) pip install --force-reinstall --no-deps "$PACKAGE" ;; esac
}

pip() { $own -m pip --disable-pip-version-check --no-input "$@"; }

# The index of the project's own builds has onnxruntime-gpu for Jetsons; PyPI's onnxruntime knows no CUDA there, and both
# have the same module.
onnxruntime() {
    if $own -c 'import onnxruntime as o, sys; sys.exit("CUDAExecutionProvider" not in o.get_available_providers())' 2>/dev/null; then
        say "onnxruntime with CUDA is there"
        return
    fi
    say "installing onnxruntime-gpu from $WHEELS"
    pip uninstall -y onnxruntime onnxruntime-gpu
    pip install coloredlogs flatbuffers packaging protobuf sympy
    pip install --no-deps --index-url "$WHEELS" onnxruntime-gpu
}

# One of nvcc's processes takes up to 2 GB: no more of them than memory has room for, and no swap.
llama() {
    if $own -c 'import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())' 2>/dev/null; then
        say "llama.cpp with CUDA is there"
        return
    fi
    local jobs cores target
    target=$(sm)
    cores=$(nproc)
    jobs=$(awk '/MemAvailable/ { print int($2 / 2097152) }' /proc/meminfo)
    [ "$jobs" -ge 1 ] || fail "expected 2 GiB of free memory to compile CUDA code, found less; end other programs"
    [ "$jobs" -le "$cores" ] || jobs=$cores
    say "building llama.cpp for SM $target with $jobs processes; this takes half an hour"
    CUDACXX=/usr/local/cuda/bin/nvcc CMAKE_BUILD_PARALLEL_LEVEL=$jobs \
        CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$target -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF" \
        pip install --no-cache-dir --no-binary llama-cpp-python 'llama-cpp-python>=0.3.36'
}

# Units, rules and rotation; a file is only touched where it differs.
service() {
    local unit
    for unit in rlrc-run@.service rlrc-serve@.service; do
        place "$unit" "/etc/systemd/system/$unit"
        if systemd_is 254; then place backoff.conf "/etc/systemd/system/$unit.d/backoff.conf"; fi
    done
    place 70-rlrc.rules /etc/udev/rules.d/70-rlrc.rules
    place rlrc.logrotate /etc/logrotate.d/rlrc
    [ -e "$root/etc/rlrc/example.env" ] || place example.env /etc/rlrc/example.env
    if [ -z "$root" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        udevadm control --reload
        udevadm trigger --subsystem-match=video4linux --subsystem-match=tty
    fi
    say "units are there: edit a copy of /etc/rlrc/example.env, then systemctl enable --now rlrc-run@NAME"
}

place() {
    cmp -s "$1" "$root$2" || install -D -m 644 "$1" "$root$2"
}

systemd_is() {
    local version
    version=$(systemctl --version 2>/dev/null | awk 'NR == 1 { print $2 }')
    [ "${version:-0}" -ge "$1" ]
}

doctor() { "$home/venv/bin/rlrc" jetson doctor || say "the lines with FIX say what is left to do"; }

stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(check packages user python onnxruntime llama service doctor)
for stage in "${stages[@]}"; do
    case "$stage" in
        check | packages | user | python | onnxruntime | llama | service | doctor) "$stage" ;;
        *) fail "expected check, packages, user, python, onnxruntime, llama, service or doctor, found $stage" ;;
    esac
done
