"""The command `rlrc sensitivity`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from rlrc import strict
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.threads import set_threads
from rlrc.compressor.models import device
from rlrc.compressor.prune.sensitivity_report import KINDS, SensitivityReport
from rlrc.compressor.stages.sensitivity import SensitivityConfig, measure
from rlrc.compressor.stages.sources import open_source
from rlrc.folders import check_output, replace_file, translate_storage_errors
from rlrc.processes import cores

SHOWN = 5  # modules at either end of a ranking


@dataclass(frozen=True)
class Sensitivity:
    """Measure how far the actions move when one module alone is pruned, rounded to 4 bits, or dropped.

    PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub. After an interruption the
    same command continues.
    """

    path: Positional[Path]
    """artifact to measure"""
    out: Path
    """JSON file to write, for rlrc prune --sensitivity"""
    picture: Path | None = None
    """SVG file to write, with the result as a chart"""
    config: OmitArgPrefixes[SensitivityConfig] = field(default_factory=SensitivityConfig)
    threads: int = field(default_factory=cores)
    """threads of torch (default: as many cores as this process may use)"""
    device: str = "auto"
    """where torch computes: auto (the accelerator that torch finds, else the CPU), cpu, cuda, cuda:N or mps"""
    checkpoint: OmitArgPrefixes[Flags] = field(default_factory=Flags)
    json: bool = False
    """print the result as JSON"""

    def run(self) -> None:
        set_threads(self.threads)
        where = device.use(self.device)
        for file in (self.out, self.picture):
            if file is not None:
                check_output(file)
        if self.picture is not None:
            import matplotlib  # noqa: F401  # if it is missing, fail before the measurement
        self.out.parent.mkdir(parents=True, exist_ok=True)
        journal = self.out.with_name(f".{self.out.name}.run")
        with translate_storage_errors(self.out):
            report = measure(open_source(self.path, self.checkpoint), str(self.path), self.config, journal, where)
        text = json.dumps(strict.encode(report), indent=1)
        with replace_file(self.out) as partial:
            partial.write_text(text + "\n")
        if self.picture is not None:
            from rlrc.compressor.cli.sensitivity_chart import draw

            with replace_file(self.picture) as partial:
                draw(report, partial)
        journal.unlink()
        if self.json:
            print(text)
        else:
            print_ranking(report)
            flags = f"--allocation sensitivity --sensitivity {self.out}"
            Console().print(f"next: rlrc prune {self.path} OUT {flags}", soft_wrap=True)


def print_ranking(report: SensitivityReport) -> None:
    """Prints the modules with the largest and the smallest errors, for every kind of change."""
    console = Console()
    for kind in KINDS:
        rows = sorted((row for row in report.modules if row.kind == kind), key=lambda row: -row.error)
        if not rows:
            continue
        few = rows if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], None, *rows[-SHOWN:]]
        what = {"prune": f"{report.ratio:.0%} pruned", "quantize": f"{report.bits} bits", "drop": "dropped"}[kind]
        console.print(f"[bold]{what}[/bold]: change of the actions, normalised")
        for row in few:
            console.print("  ..." if row is None else f"  {row.error:.5f}  {row.module}", highlight=False)
