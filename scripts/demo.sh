#!/usr/bin/env bash
# The main job in a few minutes, from the committed dense checkpoint: prune, recover by SFT and by PPO, quantize, export, run in
# closed loop, measure, report. The full budget is the same with --recipe rlrc-90 and more episodes (scripts/reference.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$(cd "${RLRC_VENV:-.venv}" && pwd)/bin:$PATH"
dense=reference/dense out=runs/demo
mkdir -p runs
rm -rf "$out" # the demo always really runs every stage
mkdir "$out"

rlrc inspect "$dense"
rlrc compress "$dense" "$out/compressed" --recipe demo --evaluate 2
rlrc run "$out/compressed" --env metaworld:drawer-open-v3 --hz 20
bash scripts/measure.sh "$dense" "$out/compressed" "$out" 4
rlrc report "$out"/{success,latency,claims}.json "$out"/compressed/curves/*.jsonl \
    --before "pruned=$out/graphs/pruned" --after "compressed=$out/compressed" \
    --joined "$out/results.json" --beside benchmarks/results/reference.json --out "$out/report.html"
