#!/usr/bin/env bash
# Does PPO earn its place? The pruned reference policy is recovered from one demonstration a task, without an expert to ask
# (no DAgger), by SFT, by SFT and then PPO, and by SFT alone for the CPU-minutes of both; the same with three seeds, each with a
# demonstration of its own. Then all are evaluated on the same scenes. About two CPU-hours; a later call goes on.
#   scripts/recovery.sh            writes benchmarks/results/recovery.json
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$(cd "${RLRC_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_WAIT_POLICY=passive
pruned=runs/reference/compressed.stages/prune out=runs/recovery
mkdir -p "$out"

rows=()
for seed in 0 1 2; do
    demonstrations=(--demonstrations 1 --first-seed "$seed" --seed "$seed")
    [ -d "$out/sft-$seed" ] ||
        rlrc sft "$pruned" "$out/sft-$seed" --steps 300 --rate 1e-3 "${demonstrations[@]}"
    [ -d "$out/sft+ppo-$seed" ] ||
        rlrc rl "$out/sft-$seed" "$out/sft+ppo-$seed" --iterations 8 --episodes 260 "${demonstrations[@]}"
    [ -d "$out/sft-long-$seed" ] ||
        rlrc sft "$pruned" "$out/sft-long-$seed" --steps 1500 --rate 1e-3 "${demonstrations[@]}"
    rows+=("sft-$seed" "sft+ppo-$seed" "sft-long-$seed")
done

artifacts=()
for row in "${rows[@]}"; do
    [ -d "$out/graphs/$row" ] || { mkdir -p "$out/graphs" && rlrc export "$out/$row" "$out/graphs/$row" > /dev/null; }
    artifacts+=("$row=$out/graphs/$row")
done
# 50 episodes of each of the 13 tasks, 100 of button-press: 100 of every task, its shared scenes included.
rlrc bench success "${artifacts[@]}" --episodes-per-task 50 --out "$out/success.json" --force
python scripts/recovery.py "$out" "$out/success.json" benchmarks/results/recovery.json docs/recovery.svg
