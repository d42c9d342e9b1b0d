#!/usr/bin/env bash
# Writes the committed results as a report: docs/report.md with its charts, and runs/report.html (not committed). Measures
# nothing. The geometries at the end are those to predict.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

results=(benchmarks/results/{reference,claims,recovery}.json)
for file in benchmarks/results/{claims-*,memory,peers,peers-*}.json; do
    [ ! -f "$file" ] || results+=("$file")
done
mkdir -p runs
rm -rf docs/report # old charts
for out in docs/report.md runs/report.html; do
    rlrc report "${results[@]}" reference/compressed/curves/*.jsonl --out "$out" --force \
        --predict openvla-7b openvla-oft-7b pi0 smolvla-450m
done
