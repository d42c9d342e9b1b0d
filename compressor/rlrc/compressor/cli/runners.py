"""The functions of the stages."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from rlrc.artifact import Manifest

# Stage: its function, imported when the stage runs because that of rl needs the simulator's packages.
RUNNERS = {
    "prune": "rlrc.compressor.stages.prune:run_prune",
    "sft": "rlrc.compressor.stages.sft:run_sft",
    "distill": "rlrc.compressor.stages.distill:run_distill",
    "rl": "rlrc.compressor.stages.rl:run_rl",
    "quantize": "rlrc.compressor.stages.quantize:run_quantize",
}


def runner(stage: str) -> Callable[..., Manifest]:
    """The function of a stage: (source, out, config, options, flags) -> manifest."""
    module, name = RUNNERS[stage].split(":")
    found: Callable[..., Manifest] = getattr(importlib.import_module(module), name)
    return found
