"""Commands that need no simulator but for policies of the reference family: prune, quantize."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from rlrc.artifact import Manifest
from rlrc.compressor import recipe as recipes
from rlrc.compressor.backbones.tiny import FAMILY as REFERENCE
from rlrc.compressor.lossless import lines
from rlrc.compressor.prune import PruneConfig
from rlrc.compressor.prune import lines as removed
from rlrc.compressor.quantize import QuantizeConfig
from rlrc.compressor.stages import Options, run_prune, run_quantize
from rlrc.errors import UserError
from rlrc.runtime.official import Flags


def report(out: Path, manifest: Manifest, as_json: bool, following: str) -> None:
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
    for line in lines(entry.after["lossless"]) if "lossless" in entry.after else []:
        console.print(line, soft_wrap=True, highlight=False)
    for line in removed(entry.after["removed"]) if "removed" in entry.after else []:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"next: {following}")


@dataclass(frozen=True)
class StageCommand:
    """What the commands of all stages have in common."""

    source: Positional[Path]
    """artifact to start from"""
    out: Positional[Path]
    """artifact to write; must not exist"""
    recipe: str | None = None
    """take this stage's settings from a recipe (a TOML file, or: reference, compress, demo) instead of from flags"""
    options: OmitArgPrefixes[Options] = field(default_factory=Options)
    json: bool = False
    """print the result as JSON"""

    def _run(self, stage: str, runner: Callable[..., Manifest], config: Any, following: str, *flags: Flags) -> None:
        if self.recipe is not None:
            if config != type(config)():
                raise UserError(
                    f"expected the settings of {stage} from the recipe or from flags, found both; edit the recipe"
                )
            config = recipes.section(self.recipe, stage)
        manifest = runner(self.source, self.out, config, self.options, *flags)
        if manifest.policy.family != REFERENCE:  # nothing here trains it
            following = "rlrc export {out} OUT"
        report(self.out, manifest, self.json, following.format(out=self.out))


@dataclass(frozen=True)
class Prune(StageCommand):
    """Cut whole heads and MLP channels of a tower's intermediate blocks, or only what no action depends on.

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    config: OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)
    official: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        self._run("prune", run_prune, self.config, "rlrc sft {out} OUT --recipe compress", self.official)


@dataclass(frozen=True)
class Quantize(StageCommand):
    """Round the weights to int4, groups of 32.

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    config: OmitArgPrefixes[QuantizeConfig] = field(default_factory=QuantizeConfig)
    official: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        self._run("quantize", run_quantize, self.config, "rlrc export {out} OUT", self.official)
