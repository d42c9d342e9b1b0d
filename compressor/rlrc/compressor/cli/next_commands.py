"""The commands that can follow a stage, which a stage's command prints as its last line."""

from __future__ import annotations

from pathlib import Path

from rlrc.artifact import Manifest
from rlrc.compressor.models.tiny import FAMILY as REFERENCE

# Only the export follows quantize: every other stage would store the weights as floats again.
NEXT = {
    "new": ("sft",),
    "prune": ("sft", "distill", "quantize", "export"),
    "sft": ("prune", "rl", "quantize", "export"),
    "distill": ("rl", "quantize", "export"),
    "rl": ("quantize", "export"),
    "quantize": ("export",),
}
LOSSLESS = ("prune", "sft", "quantize", "export")  # after prune --lossless, which needs no recovery


def following(manifest: Manifest) -> tuple[str, ...]:
    """The names of the commands that make sense for an artifact that a stage has just written."""
    last = manifest.history[-1]
    after = LOSSLESS if last.config.get("lossless") else NEXT[last.stage]
    pruned = any(entry.stage == "prune" and not entry.config.get("lossless") for entry in manifest.history)
    # A policy is pruned once. Reinforcement learning recovers a pruned policy in the reference family's simulator.
    left_out = {"prune"} if pruned else {"rl"}
    if not _uses_simulator(manifest):
        left_out.add("rl")
    return tuple(name for name in after if name not in left_out)


def next_commands(out: Path, manifest: Manifest) -> str:
    """The commands with the flags that they cannot do without: "rlrc quantize OUT1 OUT2, or ..."."""
    recipe = "reference" if manifest.history[-1].stage == "new" else "rlrc-90"
    data = "" if _uses_simulator(manifest) else " --data FOLDER"
    flags = {"sft": data or f" --recipe {recipe}", "distill": f" --teacher DENSE{data}", "prune": data}
    return ", or ".join(f"rlrc {name} {out} OUT{flags.get(name, '')}" for name in following(manifest))


def _uses_simulator(manifest: Manifest) -> bool:
    """Whether its demonstrations come from the simulator."""
    return manifest.policy.family == REFERENCE
