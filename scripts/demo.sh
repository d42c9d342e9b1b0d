#!/usr/bin/env bash
# Runs the whole workflow on the committed dense checkpoint in a few minutes: prune, recover by SFT and PPO, quantize,
# export, run in closed loop, measure, report. scripts/reference.sh does the same with the full budget.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$(cd "${RLRC_VENV:-.venv}" && pwd)/bin:$PATH"
dense=reference/dense out=runs/demo
mkdir -p runs
rm -rf "$out" # run every stage anew
mkdir "$out"

rlrc inspect "$dense"
rlrc compress "$dense" "$out/compressed" --recipe demo --evaluate 2
rlrc run "$out/compressed" --env metaworld:drawer-open-v3 --hz 20
bash scripts/measure.sh "$dense" "$out/compressed" "$out" 4
rlrc report "$out"/{success,latency,claims}.json "$out"/compressed/curves/*.jsonl \
    --before "pruned=$out/graphs/pruned" --after "compressed=$out/compressed" \
    --joined "$out/results.json" --beside benchmarks/results/reference.json --out "$out/report.html"
