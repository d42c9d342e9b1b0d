"""The command `rlrc new`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from rlrc.compressor.cli.next_commands import next_commands
from rlrc.compressor.stages.reference import create_reference


@dataclass(frozen=True)
class New:
    """Make the reference policy with random weights."""

    out: Positional[Path]
    """artifact to write"""
    seed: int = 0

    def run(self) -> None:
        Console().print(f"next: {next_commands(self.out, create_reference(self.out, self.seed))}", soft_wrap=True)
