#!/usr/bin/env bash
# Installs the requirements of `make demo` and `make test` on a fresh Debian 12 or Ubuntu 22.04/24.04 with Python >= 3.10:
# system packages (as root or with passwordless sudo), a virtual environment (.venv, or RLRC_VENV) and the Python packages
# of constraints.txt. Does nothing if the environment is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${RLRC_VENV:-.venv}
extras=cpu,compress,export,sim,data,serve,report,dev

say() { echo "setup: $*"; }
fail() { echo "setup: error: $*" >&2; exit 2; }

# Hash of the inputs of this set-up. It includes the folder, because the installation points into this checkout.
fingerprint() { { cat pyproject.toml constraints.txt scripts/setup.sh; "$venv/bin/python" -VV; pwd; } | sha256sum; }

stamp=$venv/rlrc-setup
if [ -f "$stamp" ] && [ "$(fingerprint 2>&1)" = "$(cat "$stamp")" ]; then
    say "$venv is up to date"
    exit 0
fi

find_python() {
    local python
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
}
python=$(find_python)
[ -n "$python" ] || fail "expected Python 3.10 or later, found $(python3 -V 2>&1); install it: apt-get install python3"

install_system_packages() {
    local packages=() package
    for package in libegl1 libgl1 libgl1-mesa-dri libgles2 libosmesa6; do # headless rendering: EGL or OSMesa
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || packages+=("$package")
    done
    command -v strace >/dev/null || packages+=(strace) # a test traces the network connections of commands
    if ! command -v cc >/dev/null || ! command -v c++ >/dev/null || ! command -v make >/dev/null; then
        packages+=(build-essential)
    fi
    # Debian packages venv separately, as python3.X-venv for every packaged Python.
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        packages+=("$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')")
    [ ${#packages[@]} -gt 0 ] || return 0

    local sudo=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || fail "expected root or passwordless sudo, found neither; first run as root:" \
            "apt-get install -y --no-install-recommends ${packages[*]}"
        sudo=(sudo -n)
    fi
    say "installing system packages: ${packages[*]}"
    local log
    log=$(mktemp)
    "${sudo[@]}" apt-get update -qq >"$log" 2>&1 || say "apt-get update failed; using the existing package lists"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" \
        >"$log" 2>&1 || fail "apt-get install ${packages[*]} failed: $(tail -n 1 "$log") (more in $log)"
    rm -f "$log"
}

# QEMU's user mode: only the tests need it, to run 8-bit graphs on an emulated processor without VNNI.
install_emulator() {
    local sudo=()
    if [ "$(uname -m)" != x86_64 ] || command -v qemu-x86_64-static >/dev/null || command -v qemu-x86_64 >/dev/null; then
        return 0
    fi
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    say "installing qemu-user-static"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-user-static \
        >/dev/null 2>&1 || say "qemu-user-static cannot be installed; tests of other processors' kernels will be skipped"
}
if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
    install_system_packages
    install_emulator
else
    say "apt-get not found: a C++ compiler, make and EGL or OSMesa must already be installed"
fi

# An interrupted earlier attempt may have left an environment without pip; venv completes it.
if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
    say "creating the virtual environment $venv with $("$python" -V)"
    "$python" -m venv "$venv" || fail "$python -m venv $venv failed"
fi

say "installing rlrc[$extras] into $venv; the first installation takes minutes, mostly for torch"
"$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".[$extras]" ||
    fail "pip install failed; see its last lines above"

fingerprint >"$stamp"
say "done"
