"""Checks without a GPU whether NVIDIA's parser and builder accept the graphs, by TensorRT-RTX.

TensorRT-RTX shares TensorRT's ONNX parser and network definition, and builds for absent GPUs. It has no target for
Jetson (SM 8.7, 11.0); SM 8.6 is the nearest to Orin. It does not show whether TensorRT of another release finds kernels
on the device, how fast they are, or what they compute.

Each graph is built in its own process: the builder may end the process after it refuses a graph.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc import artifact as artifacts
from rlrc.artifact.build_plan import PLAN, read_plan
from rlrc.errors import UserError
from rlrc.jetson.board.engines import build_engine
from rlrc.runtime.inference.backends import FOLDERS

TARGETS = (75, 80, 86, 89, 120)


@dataclass(frozen=True)
class Built:
    """``engine_bytes`` of a graph that was parsed and built, else the reason why not."""

    graph: str
    engine_bytes: int = 0
    failure: str | None = None


def check(path: Path, sm: int) -> list[Built]:
    """Builds every TensorRT graph of the artifact for the compute capability ``sm``. Raises UserError without them."""
    artifact = artifacts.load(path, verify=(FOLDERS["tensorrt"],))
    plan = read_plan(artifact.file(PLAN))
    if sm not in TARGETS:
        raise UserError(f"expected a target of {', '.join(map(str, TARGETS))}, found {sm}; choose one of those")
    if sm < plan.least_sm:
        raise UserError(f"expected SM {plan.least_sm} or later for {plan.precision}, found {sm}; choose such a target")
    rtx()
    return [_check_in_process(path, graph.name, sm) for graph in plan.graphs]


def rtx() -> Any:
    """TensorRT-RTX's module, from either of its wheels. Raises UserError without them."""
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError("expected TensorRT-RTX, found none; run pip install 'rlrc[tensorrt-check]' in a new environment")


def _check_in_process(path: Path, graph: str, sm: int) -> Built:
    command = [sys.executable, "-m", "rlrc.jetson.board.check", str(path), graph, str(sm)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return Built(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        errors = " ".join(done.stderr.split())[-300:]
        return Built(graph, failure=f"the builder ended its process with code {done.returncode}: {errors}")


def main(path: str, name: str, sm: str) -> None:
    trt, plan = rtx(), read_plan(Path(path, PLAN))

    def target(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)

    (graph,) = (graph for graph in plan.graphs if graph.name == name)
    try:
        engine, _ = build_engine(trt, graph, plan, Path(path), target=target)
        built = Built(name, engine.nbytes)
    except UserError as error:
        built = Built(name, failure=str(error))
    print(json.dumps(vars(built)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
