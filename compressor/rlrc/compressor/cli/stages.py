"""Commands that need no simulator but for policies of the reference family: prune, quantize, compare-grids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from rlrc.artifact import Manifest
from rlrc.artifact.describe import normalisation_lines
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.next_commands import hint
from rlrc.compressor.prune.lossless import lines
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.prune.prune import lines as removed
from rlrc.compressor.quantize.compare import GRIDS, RoundingRow, compare
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.quantize.quantize import lines as rounding_lines
from rlrc.compressor.stages import recipe as recipes
from rlrc.compressor.stages.artifact_io import every_input
from rlrc.compressor.stages.prune import run_prune
from rlrc.compressor.stages.quantize import run_quantize
from rlrc.compressor.stages.sources import open_source, unquantized_only
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import distributed
from rlrc.errors import UserError
from rlrc.processes import cores
from rlrc.progress import progress
from rlrc.tables import plain_console


def report(out: Path, manifest: Manifest, as_json: bool) -> None:
    entry = manifest.history[-1]
    summary = {
        "artifact": str(out),
        "stage": entry.stage,
        "parameters": manifest.parameters,
        "cpu_minutes": entry.cpu_minutes,
    }
    summary |= {"success_before": entry.before.get("success"), "success_after": entry.after.get("success")}
    if as_json:
        print(json.dumps(summary | {"before": entry.before, "after": entry.after}))
        return
    console = Console()
    shown = {key: value for key, value in summary.items() if value is not None}
    console.print(
        "  ".join(
            f"[bold]{key}[/bold] {value:,}" if isinstance(value, int) else f"[bold]{key}[/bold] {value}"
            for key, value in shown.items()
        )
    )
    printed: dict[str, Callable[[Any], list[str]]]
    printed = {"lossless": lines, "removed": removed, "rounding": rounding_lines, "normalisation": normalisation_lines}
    for line in (line for key, of in printed.items() if key in entry.after for line in of(entry.after[key])):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"next: {hint(out, manifest)}", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class StageCommand:
    """What the commands of all stages have in common."""

    source: Positional[Path]
    """artifact to start from"""
    out: Positional[Path]
    """artifact to write; must not exist"""
    recipe: str | None = None
    """take this stage's settings from a recipe (a TOML file, or the name of one of ours) instead of from flags"""
    options: OmitArgPrefixes[StageOptions] = field(default_factory=StageOptions)
    json: bool = False
    """print the result as JSON"""

    def _run(self, stage: str, runner: Callable[..., Manifest], config: Any, *flags: Flags) -> None:
        if self.recipe is not None:
            if config != type(config)():
                raise UserError(
                    f"expected the settings of {stage} from the recipe or from flags, found both; edit the recipe"
                )
            config = recipes.section(self.recipe, stage)
        manifest = runner(self.source, self.out, config, self.options, *flags)
        if distributed.rank():  # the first process tells
            return
        report(self.out, manifest, self.json)


@dataclass(frozen=True)
class Prune(StageCommand):
    """Cut whole heads and MLP channels of a tower's intermediate blocks, or only what no action depends on.

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    config: OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        self._run("prune", run_prune, self.config, self.checkpoint)


@dataclass(frozen=True)
class Quantize(StageCommand):
    """Round the weights to int4 or int8, groups of 32 (64, 128), fp16 scales.

    Calibrated methods look at the artifact's golden observations. Those of an official checkpoint are random pictures:
    what is calibrated on them says nothing about real ones.

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    config: OmitArgPrefixes[QuantizeConfig] = field(default_factory=QuantizeConfig)
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        self._run("quantize", run_quantize, self.config, self.checkpoint)


@dataclass(frozen=True)
class CompareGrids:
    """What rounding costs a policy: int4 by each method, NF4 (which is never stored) and int8. Writes no artifact.

    Every second golden observation is calibrated on, errors are measured on the others. PATH may also be an official
    checkpoint's folder, or owner/name[@revision] on the hub; its observations are random pictures.
    """

    path: Positional[Path]
    """what to round"""
    threads: int = field(default_factory=cores)
    """threads of torch (default: as many cores as this process may use)"""
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)
    json: bool = False
    """print the result as JSON"""

    def run(self) -> None:
        if self.threads < 1:
            raise UserError(f"expected --threads >= 1, found {self.threads}")
        source = open_source(self.path, self.checkpoint)
        unquantized_only(source, self.path)
        torch.set_num_threads(self.threads)
        policy = source.load()
        rows = list[RoundingRow]()
        with progress("compare-grids", len(GRIDS)) as tell:
            for row in compare(policy, every_input(policy.spec, source.observations())):
                rows.append(row)
                tell(len(rows), row.grid)
        if self.json:
            print(json.dumps([asdict(row) for row in rows]))
            return
        console = plain_console()
        console.print(f"{'grid':6}{'weight error':>14}{'output error':>14}{'action error':>14}{'bytes':>16}")
        for row in rows:
            errors = "".join(f"{error:14.5f}" for error in (row.weight_error, row.output_error, row.action_error))
            console.print(f"{row.grid:6}{errors}{row.bytes:16,}")
