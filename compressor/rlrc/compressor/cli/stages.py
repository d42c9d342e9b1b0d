"""What the commands of all stages share, and those that need no simulator: prune, quantize."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from rlrc.artifact import Manifest
from rlrc.artifact.describe import normalisation_lines
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.next_commands import next_commands
from rlrc.compressor.cli.runners import runner
from rlrc.compressor.prune.config import PruneConfig
from rlrc.compressor.prune.lossless import format_report as lossless_lines
from rlrc.compressor.prune.prune import format_report as prune_lines
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.quantize.quantize import format_report as rounding_lines
from rlrc.compressor.stages import recipe as recipes
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import distributed
from rlrc.errors import UserError

# What a stage recorded in the history, and how it is printed.
REPORTS: dict[str, Callable[[Any], list[str]]] = {
    "lossless": lossless_lines,
    "removed": prune_lines,
    "rounding": rounding_lines,
    "normalisation": normalisation_lines,
}


@dataclass(frozen=True)
class StageCommand:
    """Runs one stage on an artifact."""

    stage: ClassVar[str]

    source: Positional[Path]
    """artifact to start from"""
    out: Positional[Path]
    """artifact to write; must not exist"""
    recipe: str | None = None
    """take this stage's settings from a recipe (a TOML file or the name of a built-in recipe) instead of from flags"""
    options: OmitArgPrefixes[StageOptions] = field(default_factory=StageOptions)
    json: bool = False
    """print the result as JSON"""
    config: Any = None

    def run(self) -> None:
        self._run(Flags())

    def _run(self, flags: Flags) -> None:
        config = self.config
        if self.recipe is not None:
            if config != type(config)():
                raise UserError(
                    f"expected the settings of {self.stage} from the recipe or from flags, found both; edit the recipe"
                )
            config = recipes.section(self.recipe, self.stage)
        manifest = runner(self.stage)(self.source, self.out, config, self.options, flags)
        if distributed.rank() == 0:
            report(self.out, manifest, self.json)


@dataclass(frozen=True)
class CheckpointStageCommand(StageCommand):
    """Runs one stage on an artifact or on a checkpoint folder."""

    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        self._run(self.checkpoint)


@dataclass(frozen=True)
class Prune(CheckpointStageCommand):
    """Cut whole heads and MLP channels of a tower's intermediate blocks, or only what no action depends on.

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    stage = "prune"
    config: OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)


@dataclass(frozen=True)
class Quantize(CheckpointStageCommand):
    """Round the weights to int4 or int8 in groups of 32, 64 or 128 with fp16 scales.

    Calibrated methods use the observations of a data set (--data) or else the artifact's golden ones. Those of an
    official checkpoint are random pictures, so calibration on them does not carry over to real ones.

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    stage = "quantize"
    config: OmitArgPrefixes[QuantizeConfig] = field(default_factory=QuantizeConfig)


def report(out: Path, manifest: Manifest, as_json: bool) -> None:
    """Prints what the last stage did, and the commands that can follow."""
    entry = manifest.history[-1]
    summary = {
        "artifact": str(out),
        "stage": entry.stage,
        "parameters": manifest.parameters,
        "cpu_minutes": entry.cpu_minutes,
        "success_before": entry.before.get("success"),
        "success_after": entry.after.get("success"),
    }
    if as_json:
        print(json.dumps(summary | {"before": entry.before, "after": entry.after}))
        return
    console = Console()
    pairs = (
        f"[bold]{key}[/bold] {value:,}" if isinstance(value, int) else f"[bold]{key}[/bold] {value}"
        for key, value in summary.items()
        if value is not None
    )
    console.print("  ".join(pairs))
    for key, lines in REPORTS.items():
        for line in lines(entry.after[key]) if key in entry.after else ():
            console.print(line, soft_wrap=True, highlight=False)
    console.print(f"next: {next_commands(out, manifest)}", soft_wrap=True, highlight=False)
