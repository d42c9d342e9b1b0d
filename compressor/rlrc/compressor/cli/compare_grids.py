"""The command `rlrc compare-grids`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.threads import set_threads
from rlrc.compressor.models import device
from rlrc.compressor.models.storage.scratch import Scratch
from rlrc.compressor.quantize.compare import GRIDS, RoundingRow, compare
from rlrc.compressor.stages.artifact_io import every_input
from rlrc.compressor.stages.sources import check_unquantized, open_source
from rlrc.processes import cores
from rlrc.progress import progress
from rlrc.tables import plain_console


@dataclass(frozen=True)
class CompareGrids:
    """Measure the error of rounding: int4 by each method, NF4 (never stored) and int8. Writes no artifact.

    Half of the golden observations serve for calibration; the errors are measured on the other half. PATH may also be
    an official checkpoint's folder, or owner/name[@revision] on the hub; its observations are random pictures.
    """

    path: Positional[Path]
    """artifact to round"""
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
        source = open_source(self.path, self.checkpoint)
        check_unquantized(source, self.path)
        policy = source.load().to(where)
        inputs = [one.to(where) for one in every_input(policy.spec, source.observations())]
        rows, scratch = list[RoundingRow](), Scratch(Path(tempfile.gettempdir()))
        with progress("compare-grids", len(GRIDS)) as report:
            for row in compare(policy, inputs, allocate=scratch.empty):
                rows.append(row)
                report(len(rows), row.grid)
        if self.json:
            print(json.dumps([asdict(row) for row in rows]))
            return
        console = plain_console()
        console.print(f"{'grid':6}{'weight error':>14}{'output error':>14}{'action error':>14}{'bytes':>16}")
        for row in rows:
            errors = "".join(f"{error:14.5f}" for error in (row.weight_error, row.output_error, row.action_error))
            console.print(f"{row.grid:6}{errors}{row.bytes:16,}")
