"""Which commands can follow a stage: the last line that a stage's command prints."""

from __future__ import annotations

from pathlib import Path

from rlrc.artifact import Manifest
from rlrc.compressor.models.tiny import FAMILY as REFERENCE

# Nothing follows quantize but the export: every other stage would store the weights as floats again.
NEXT = {
    "new": ("sft",),
    "prune": ("sft", "distill", "quantize", "export"),
    "sft": ("prune", "rl", "quantize", "export"),
    "distill": ("rl", "quantize", "export"),
    "rl": ("quantize", "export"),
    "quantize": ("export",),
}
LOSSLESS = ("prune", "sft", "quantize", "export")  # after prune --lossless: nothing has to be recovered


def following(manifest: Manifest) -> tuple[str, ...]:
    """The stages and commands that make sense for an artifact that a stage has just written."""
    last = manifest.history[-1]
    after = LOSSLESS if last.config.get("lossless") else NEXT[last.stage]
    pruned = any(entry.stage == "prune" and not entry.config.get("lossless") for entry in manifest.history)
    # Reinforcement learning is a recovery, in the simulator of the reference family; a policy is pruned once.
    left = {"prune"} if pruned else {"rl"}
    return tuple(name for name in after if name not in left | (set() if _uses_simulator(manifest) else {"rl"}))


def hint(out: Path, manifest: Manifest) -> str:
    """ "rlrc quantize OUT1 OUT2, or ...", with the flags that a command cannot do without."""
    recipe = "reference" if manifest.history[-1].stage == "new" else "rlrc-90"
    lessons = f" --recipe {recipe}" if _uses_simulator(manifest) else " --data FOLDER"
    flags = {"sft": lessons, "distill": f" --teacher DENSE{'' if _uses_simulator(manifest) else ' --data FOLDER'}"}
    flags["prune"] = "" if _uses_simulator(manifest) else " --data FOLDER"
    return ", or ".join(f"rlrc {name} {out} OUT{flags.get(name, '')}" for name in following(manifest))


def _uses_simulator(manifest: Manifest) -> bool:
    """Whether its demonstrations come from the simulator."""
    return manifest.policy.family == REFERENCE
