"""The command ``rlrc export``: a dataclass whose field docstrings are the help texts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc.artifact.precisions import ExportPrecision
from rlrc.errors import UserError
from rlrc.folders import check_output
from rlrc.progress import status
from rlrc.runtime.cli.describe import format_trial_command, records_table
from rlrc.runtime.inference.backends import TARGETS
from rlrc.runtime.inference.decode import NoAction
from rlrc.tables import print_table


@dataclass(frozen=True)
class Export:
    """Write a new artifact with the graphs that the runtime loads, verified on its golden observations.

    If the graphs disagree with the torch policy, nothing is written and the exit code is 1.
    """

    path: Positional[Path]
    """the artifact to export"""
    out: Positional[Path]
    """the artifact to write"""
    to: tuple[Literal["onnx", "gguf", "tensorrt"], ...] = ("onnx",)
    """kinds of graphs to write: onnx runs on ONNX Runtime, gguf on llama.cpp (pictures on ONNX Runtime); from tensorrt
    graphs, rlrc jetson build makes engines on the device"""
    precision: Literal["auto", ExportPrecision] | None = None
    """onnx, float weights: fp16 (default unless the weights are float32), fp32, int8; int4 weights: int4 (default),
    int4a8, int8, w4a8; int8 weights: w8 (default), int8. fp16, int4 and w8 only set how weights are stored; products
    are in fp32. The others compute in 8 bits, which is faster but not exact: int4a8 with 4-bit weights, int8 with
    8-bit weights, w4a8 the same with 4-bit weights in the file. int8-rows is int8 for language models, where some rows
    are much larger than others. int8+int4 reads the prompt in int8-rows and generates tokens in int4a8; both copies of
    the weights are in memory. auto (onnx only): the fastest on this machine within the tolerance, for each graph.
    gguf: fp16 (default), fp32, int8 or q4_k_m; quantized weights keep their int4 or int8. llama.cpp also rounds
    activations, except in fp32; int4a8 and int8+int4 also compute the graphs around its blocks (pictures, heads) in
    8 bits, int8+int4 with 8-bit weights.
    tensorrt: the type of products: fp16 (default), bf16 (default for pi0.5, whose activations overflow fp16), fp32, or
    int8 with static scales; int4 weights stay int4 (default), int8 weights are widened"""
    tolerance: float | None = None
    """largest error allowed, in action units (default for fp32, and onnx's fp16, int4 and w8: half a bin, so that every
    token agrees except at ties of the reference; for the others 1 % of every dimension's range, 2 % with int4 weights,
    on 99 % of the observations)"""
    threads: int = 1
    """threads for the measurements of auto; use the robot's number"""
    budget_bytes: int | None = None
    """for auto: the most bytes that the weights of all graphs may take in memory (default: no limit)"""
    json: bool = False
    """print the result as JSON"""

    def run(self) -> int:
        check_output(self.out)
        if self.budget_bytes is not None and self.precision != "auto":
            raise UserError(
                f"expected --budget-bytes with --precision auto, found {self.precision or 'none'}; leave it out"
            )
        parent = artifacts.load(self.path)
        from rlrc.exporters.auto import export_fastest  # imported late: torch takes seconds to load
        from rlrc.exporters.export import Disagreement, export

        console = Console()
        try:
            with status(f"exporting to {', '.join(self.to)} and verifying"):
                if self.precision == "auto":
                    manifest = export_fastest(
                        parent, self.out, self.to, self.threads, self.tolerance, self.budget_bytes
                    )
                else:
                    manifest = export(parent, self.out, self.to, self.precision, self.tolerance)
        except Disagreement as error:
            if self.json:
                print(json.dumps({"verified": asdict(error.record), "failure": str(error)}, indent=1))
            else:
                print_table(records_table([error.record], parent.manifest.policy), console)
            print(
                f"rlrc: check failed: {error}; {self.out} was not written, the worst observation is in {error.worst}; "
                "allow it with --tolerance or choose another --precision",
                file=sys.stderr,
            )
            return 1
        except NoAction as error:
            print(f"rlrc: check failed: {error}; {self.out} was not written", file=sys.stderr)
            return 1
        written = [graph for graph in manifest.graphs if TARGETS[graph.backend] in self.to]
        records = [record for record in manifest.verified if TARGETS[record.backend] in self.to]
        if self.json:
            graphs = {graph.file: manifest.files[graph.file].size for graph in written}
            names = {backend: [graph.precision for graph in written if graph.backend == backend] for backend in TARGETS}
            precisions = {backend: ", ".join(dict.fromkeys(own)) for backend, own in names.items() if own}
            result = {"out": str(self.out), "precision": precisions, "graph_bytes": graphs}
            print(json.dumps(result | {"verified": [asdict(record) for record in records]}, indent=1))
            return 0
        for graph in written:
            console.print(f"{graph.file}: {graph.precision}, {manifest.files[graph.file].size:,} bytes")
        print_table(records_table(records, manifest.policy), console)
        on_device = f"rlrc jetson build {self.out} --engine-cache engines, on the device"
        here = set(self.to) - {"tensorrt"}
        console.print(f"next: {format_trial_command(self.out, manifest.policy) if here else on_device}", soft_wrap=True)
        return 0
