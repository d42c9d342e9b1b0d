#!/usr/bin/env bash
# Reproduces the committed figures: reference/ and benchmarks/results/reference.json. Takes about three CPU-hours; a later
# call resumes an interrupted one.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$(cd "${RLRC_VENV:-.venv}" && pwd)/bin:$PATH"
out=runs/reference
mkdir -p "$out"

[ -d "$out/new" ] || rlrc new "$out/new"
[ -d "$out/dense" ] || rlrc sft "$out/new" "$out/dense" --recipe reference
[ -d "$out/compressed" ] || rlrc compress "$out/dense" "$out/compressed" --recipe rlrc-90

# Controls: PPO is compared with SFT of the same CPU-minutes, recovery with extra training of the dense policy.
[ -d "$out/pruned+sft+sft" ] || rlrc sft "$out/compressed.stages/sft" "$out/pruned+sft+sft" --recipe benchmarks/studies/controls.toml
[ -d "$out/dense+sft" ] || rlrc sft "$out/dense" "$out/dense+sft" --recipe rlrc-90
[ -d "$out/dense-int4" ] || rlrc quantize "$out/dense" "$out/dense-int4"
# 8-bit products are faster than floats, but too inaccurate for an export without --tolerance.
mkdir -p "$out/graphs"
[ -d "$out/graphs/dense+int8" ] || rlrc export "$out/dense" "$out/graphs/dense+int8" --precision int8 --tolerance 2
[ -d "$out/graphs/compressed+w4a8" ] ||
    rlrc export "$out/compressed.stages/quantize" "$out/graphs/compressed+w4a8" --precision w4a8 --tolerance 2

bash scripts/measure.sh "$out/dense" "$out/compressed" "$out" 40 \
    "pruned+sft+sft=$out/pruned+sft+sft" "dense+sft=$out/dense+sft" "dense+int4=$out/dense-int4" \
    "dense+int8=$out/dense" "compressed+w4a8=$out/compressed.stages/quantize"
rlrc report "$out"/{success,latency,claims}.json "$out"/compressed/curves/*.jsonl \
    --before "pruned=$out/graphs/pruned" --after "compressed=$out/compressed" \
    --joined benchmarks/results/reference.json --picture docs/result.svg --out "$out/report.html" --force
