#!/usr/bin/env bash
# How the committed figures came to be: reference/ and benchmarks/results/reference.json. About three CPU-hours; a later call goes
# on where an earlier one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$(cd "${RLRC_VENV:-.venv}" && pwd)/bin:$PATH"
out=runs/reference
mkdir -p "$out"

[ -d "$out/new" ] || rlrc new "$out/new"
[ -d "$out/dense" ] || rlrc sft "$out/new" "$out/dense" --recipe reference
[ -d "$out/compressed" ] || rlrc compress "$out/dense" "$out/compressed" --recipe rlrc-90

# Controls. PPO has to beat SFT of the same CPU-minutes; recovery has to beat pruning at random and mere extra training.
[ -d "$out/pruned+sft+sft" ] || rlrc sft "$out/compressed.stages/sft" "$out/pruned+sft+sft" --recipe benchmarks/studies/controls.toml
[ -d "$out/dense+sft" ] || rlrc sft "$out/dense" "$out/dense+sft" --recipe rlrc-90
[ -d "$out/dense-int4" ] || rlrc quantize "$out/dense" "$out/dense-int4"
# 8-bit products: faster than floats, but too far from the torch policy for an export without --tolerance.
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
