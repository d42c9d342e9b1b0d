"""A whole compression: the stages of a recipe one after another, then the export."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlrc import artifact as artifacts
from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.precision import Wanted
from rlrc.compressor.stages.sources import PolicySource, open_source
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import distributed
from rlrc.compressor.training.distill import DistillConfig
from rlrc.errors import Interrupted, UserError
from rlrc.folders import check_output
from rlrc.progress import status

# Stage: where its function is, imported when asked for, because that of rl needs the simulator's packages.
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


def compress(
    source: Path, out: Path, recipe: dict[str, Any], options: StageOptions, flags: Flags | None = None
) -> None:
    """Every stage of a recipe, each an artifact of its own in ``OUT.stages/``, then the export to ``out``.

    ``flags`` are those of an official source, which is also the teacher of a distillation that names none. A stage that
    an earlier call finished is kept, provided it did the same to the same input; otherwise it is refused.
    """
    from rlrc.exporters.export import export  # imported late: only this function goes all the way

    if distributed.rank() == 0:
        check_output(out)
    folder = out.parent / f"{out.name}.stages"
    folder.mkdir(parents=True, exist_ok=True)
    current = source
    for name, config in recipe.items():
        taught = isinstance(config, DistillConfig) and not config.teacher
        if taught:
            config = dataclasses.replace(config, teacher=str(source))
        target, told = folder / name, (flags if current is source else None) or Flags()
        with _explain_interruption(name):
            if target.exists():
                check_same(target, name, open_source(current, told, incomplete=True), config, options.precision)
            else:
                # What a distillation is told is told of its teacher.
                runner(name)(current, target, config, options, (flags or Flags()) if taught else told)
        current = target
    if distributed.rank() == 0:
        with _explain_interruption("the export"), status("exporting, and verifying"):
            export(artifacts.load(current), out)


@contextmanager
def _explain_interruption(step: str) -> Iterator[None]:
    """An interruption within it says that the same command goes on with this step, unless it says more already."""
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        raise Interrupted.by(error, f"the same command goes on with {step}") from None


def check_same(finished: Path, name: str, source: PolicySource, config: Any, precision: Wanted) -> None:
    """Refuse a finished stage that is not what the recipe would do now."""
    *earlier, entry = artifacts.load(finished).manifest.history
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    # An official folder has no digest; but the history says which one it was.
    same = [(e.stage, e.config) for e in earlier] == [(e.stage, e.config) for e in source.history]
    same &= precision == "auto" or {precision}.issuperset(entry.precision.values())
    if not same or (entry.stage, entry.parent, json.loads(json.dumps(entry.config))) != (name, source.digest, wanted):
        raise UserError(
            f"expected {finished} to be stage {name} of this recipe and input, found another one; remove it"
        )
