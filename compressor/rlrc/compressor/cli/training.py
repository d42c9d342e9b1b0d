"""Commands that learn from demonstrations, and the one for whole recipes: sft, distill, compress."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from rlrc import artifact as artifacts
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.compress import compress
from rlrc.compressor.cli.stages import StageCommand
from rlrc.compressor.stages.distill import run_distill
from rlrc.compressor.stages.recipe import load
from rlrc.compressor.stages.sft import run_sft
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import distributed
from rlrc.compressor.training.distill import DistillConfig
from rlrc.compressor.training.sft import SFTConfig
from rlrc.runtime.cli.describe import trial


@dataclass(frozen=True)
class SFT(StageCommand):
    """Supervised fine-tuning on demonstrations: a data set's, or scripted experts', who also label (DAgger).

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    config: OmitArgPrefixes[SFTConfig] = field(default_factory=SFTConfig)
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        self._run("sft", run_sft, self.config, self.checkpoint)


@dataclass(frozen=True)
class Distill(StageCommand):
    """Train a pruned policy on demonstrations and on what the blocks of its dense teacher put out."""

    config: OmitArgPrefixes[DistillConfig] = field(default_factory=DistillConfig)
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)

    def run(self) -> None:
        self._run("distill", run_distill, self.config, self.checkpoint)


@dataclass(frozen=True)
class Compress:
    """All stages of a recipe, then the export. Finished stages are kept beside OUT and skipped by a later call."""

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
            following = f"next: {trial(self.out, spec)}, or rlrc bench claims {self.out} --baseline DENSE"
            Console().print(following, soft_wrap=True)
