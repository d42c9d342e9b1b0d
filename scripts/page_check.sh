#!/usr/bin/env bash
# Tests the operator page in headless Chromium: operator actions, console errors, accessibility (axe-core). Installs
# Chromium with apt if missing, and playwright into a separate environment (.venv-page, or RLRC_PAGE_VENV).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${RLRC_VENV:-.venv}
own=${RLRC_PAGE_VENV:-.venv-page}

say() { echo "page: $*"; }
[ -x "$venv/bin/python" ] || { echo "page: error: expected a virtual environment in $venv, found none; run make setup" >&2; exit 2; }

if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
    say "installing chromium"
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    if ! { $as_root apt-get update -q && $as_root apt-get install -yq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null; then
        say "not checked: chromium cannot be installed"
        exit 0
    fi
fi
if ! "$own/bin/python" -c 'import playwright, axe_playwright_python' 2>/dev/null; then
    say "installing playwright into $own"
    "$venv/bin/python" -m venv "$own"
    if ! "$own/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt playwright axe-playwright-python; then
        say "not checked: playwright cannot be installed"
        exit 0
    fi
fi
RLRC_PAGE_PYTHON=$(realpath -s "$own/bin/python") "$venv/bin/python" -m pytest -q -s tests/test_page_browser.py
