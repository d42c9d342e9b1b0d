"""The command `rlrc compress`: the stages of a recipe one after another, then the export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from rlrc import artifact as artifacts
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.runners import runner
from rlrc.compressor.models.precision import PrecisionOption
from rlrc.compressor.stages.recipe import load
from rlrc.compressor.stages.sources import PolicySource, open_source
from rlrc.compressor.stages.stage import StageOptions, complete_config
from rlrc.compressor.training import distributed
from rlrc.compressor.training.distill import DistillOptions
from rlrc.errors import Interrupted, UserError
from rlrc.folders import check_output
from rlrc.progress import status
from rlrc.runtime.cli.describe import format_trial_command


@dataclass(frozen=True)
class Compress:
    """Run all stages of a recipe, then the export. Finished stages are kept next to OUT; a later call skips them."""

    source: Positional[Path]
    """trained dense artifact, an official checkpoint's folder, or owner/name[@revision] on the hub"""
    out: Positional[Path]
    """artifact to write, ready for rlrc run"""
    recipe: str = "rlrc-90"
    """a TOML file, or the name of a built-in recipe"""
    options: OmitArgPrefixes[StageOptions] = field(default_factory=StageOptions)
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        compress(self.source, self.out, load(self.recipe), self.options, self.checkpoint)
        if distributed.rank() == 0:
            spec = artifacts.load(self.out, verify=()).manifest.policy
            following = (
                f"next: {format_trial_command(self.out, spec)}, or rlrc bench claims {self.out} --baseline DENSE"
            )
            Console().print(following, soft_wrap=True)


def compress(
    source: Path, out: Path, recipe: dict[str, Any], options: StageOptions, flags: Flags | None = None
) -> None:
    """Runs every stage of a recipe, each into an artifact of its own in ``OUT.stages/``, then exports to ``out``.

    ``flags`` belong to a source that is a checkpoint folder. The source is also the teacher of a distillation that
    names none. A stage that an earlier call finished is kept if it had the same configuration and input. Raises
    UserError for any other.
    """
    from rlrc.exporters.export import export  # imported late: no other command of the compressor exports

    if distributed.rank() == 0:
        check_output(out)
    folder = out.parent / f"{out.name}.stages"
    folder.mkdir(parents=True, exist_ok=True)
    current = source
    for name, config in recipe.items():
        default_teacher = isinstance(config, DistillOptions) and not config.teacher
        if default_teacher:
            config = dataclasses.replace(config, teacher=str(source))
        target, source_flags = folder / name, (flags if current is source else None) or Flags()
        with _explain_interruption(name):
            if target.exists():
                check_same(target, name, open_source(current, source_flags, incomplete=True), config, options.precision)
            else:
                # The flags of a distillation belong to its teacher.
                stage_flags = (flags or Flags()) if default_teacher else source_flags
                runner(name)(current, target, config, options, stage_flags)
        current = target
    if distributed.rank() == 0:
        with _explain_interruption("the export"), status("exporting and verifying"):
            export(artifacts.load(current), out)


@contextmanager
def _explain_interruption(step: str) -> Iterator[None]:
    """Adds to an interruption without a message that the same command continues with this step."""
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        raise Interrupted.by(error, f"the same command continues with {step}") from None


def check_same(finished: Path, name: str, source: PolicySource, config: Any, precision: PrecisionOption) -> None:
    """Raises UserError for a finished stage that is not what the recipe would do now."""
    *earlier, entry = artifacts.load(finished).manifest.history
    wanted = json.loads(json.dumps(dataclasses.asdict(complete_config(config, source)[0])))
    # A checkpoint folder has no digest, but the first entry of the history identifies it.
    same = [(e.stage, e.config) for e in earlier] == [(e.stage, e.config) for e in source.history]
    same &= precision == "auto" or {precision}.issuperset(entry.precision.values())
    if not same or (entry.stage, entry.parent, json.loads(json.dumps(entry.config))) != (name, source.digest, wanted):
        raise UserError(
            f"expected {finished} to be stage {name} of this recipe and input, found another one; remove it"
        )
