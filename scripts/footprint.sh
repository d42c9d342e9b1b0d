#!/usr/bin/env bash
# Measures the robot side. Installs the wheel with the CPU engine into a separate environment outside this checkout
# (RLRC_ROBOT_VENV, or a temporary one), then checks its size, its imports and its files, and measures the time from the
# start of `rlrc run` to the first action. Writes the result to RLRC_RESULT, if given.
set -euo pipefail
unset PYTHONPATH # use installed packages only
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "${RLRC_VENV:-.venv}")/bin/python
most=$((300 * 1000 * 1000)) # bytes
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
robot=$(realpath -sm "${RLRC_ROBOT_VENV:-$work/venv}")

say() { echo "footprint: $*"; }
fail() { echo "footprint: error: $*" >&2; exit 1; }
size() { du -sb "$1" | cut -f 1; }
[ -x "$python" ] || fail "expected a virtual environment in ${RLRC_VENV:-.venv}, found none; run make setup"

pip() { "$robot/bin/python" -m pip --disable-pip-version-check -q "$@"; }
"$python" -m venv --clear "$robot"
before=$(size "$robot")
"$python" -m pip --disable-pip-version-check -q wheel --no-deps -w "$work" . || fail "the wheel does not build"
pip install -c constraints.txt "$(echo "$work"/rlrc-*.whl)[cpu]" || fail "the wheel cannot be installed"
bytes=$(($(size "$robot") - before))
say "rlrc[cpu] takes $((bytes / 1000000)) MB"
[ "$bytes" -lt "$most" ] || fail "expected less than $((most / 1000000)) MB, found $((bytes / 1000000))"

# From here on, use nothing from the checkout except the reference policy.
cp -r reference/compressed "$work/reference-int4"
cp scripts/first_action.py scripts/installed_check.py "$work/"
result=$(realpath -sm "${RLRC_RESULT:-$work/footprint.json}")
cd "$work"
"$robot/bin/python" installed_check.py || fail "the installation is incomplete or contains too much"
rlrc=$robot/bin/rlrc
"$rlrc" inspect reference-int4 >/dev/null || fail "rlrc inspect fails"
"$rlrc" verify reference-int4 >/dev/null || fail "rlrc verify fails"
"$rlrc" jetson devices >/dev/null || fail "rlrc jetson devices fails"
"$rlrc" jetson plan reference-int4 --device orin-nano-8gb --json >/dev/null || fail "rlrc jetson plan fails"
"$rlrc" serve --help >/dev/null || fail "rlrc serve --help fails"
"$robot/bin/python" first_action.py "$result" reference-int4 --installed "$bytes" || fail "the first action takes too long"
