#!/usr/bin/env bash
# Measures the dense parent, every stage and the compressed policy on the same scenes, threads and runtime.
#   scripts/measure.sh DENSE COMPRESSED OUT EPISODES_PER_TASK [NAME=ARTIFACT ...]
# COMPRESSED.stages/ contains the artifacts of the stages, from rlrc compress. Further artifacts are controls.
set -euo pipefail
dense=$1 compressed=$2 out=$3 episodes=$4
shift 4
export OMP_WAIT_POLICY=passive
mkdir -p "$out/graphs"

# The runtime needs graphs, so every measured artifact is exported first.
graphs() {
    [ -d "$out/graphs/$1" ] || rlrc export "$2" "$out/graphs/$1" > /dev/null
    echo "$1=$out/graphs/$1"
}
rows=("$(graphs dense "$dense")")
rows+=("$(graphs pruned "$compressed.stages/prune")")
rows+=("$(graphs pruned+sft "$compressed.stages/sft")")
rows+=("$(graphs pruned+sft+ppo "$compressed.stages/rl")")
rows+=("compressed=$compressed")
for control in "$@"; do rows+=("$(graphs "${control%%=*}" "${control#*=}")"); done

rlrc bench success "${rows[@]}" --episodes-per-task "$episodes" --out "$out/success.json" --force
rlrc bench latency "${rows[@]}" --out "$out/latency.json" --force
# Exit code 1 means that a claim failed, which the table shows as well; any other code is an error.
rlrc bench claims "compressed=$compressed" --baseline "dense=$out/graphs/dense" --success "$out/success.json" \
    --out "$out/claims.json" --force || [ $? -eq 1 ]
