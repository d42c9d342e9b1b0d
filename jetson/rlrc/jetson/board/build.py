"""Builds engines on the device: once for each graph, TensorRT release and GPU; a cache keeps them.

The cache keeps timings of kernels too, which shortens the next build of a similar graph. CPU and GPU of a Jetson share
one memory. A build is given up when less than ``FLOOR`` is left or the board starts to swap, before the kernel's OOM
killer ends a process. Swap does not help: memory of the GPU cannot be swapped, so all other processes are, and a build
of minutes takes hours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc import artifact as artifacts
from rlrc.artifact import Artifact
from rlrc.artifact.build_plan import PLAN, BuildPlan, GraphPlan, read_plan
from rlrc.errors import UserError
from rlrc.folders import replace_file
from rlrc.jetson.board.engines import build_engine
from rlrc.runtime.board.jetson import meminfo
from rlrc.runtime.inference.backends import FOLDERS
from rlrc.runtime.inference.backends.engine_cache import check_graphs, engine_file, is_intact
from rlrc.runtime.inference.backends.nvidia import check_sm, check_version, device_sm, import_tensorrt

FLOOR = 256 * 2**20
SWAPPED = 64 * 2**20  # allowed: the kernel swaps out pages that have not been used for long
ADVICE = "end other programs and the desktop (sudo systemctl isolate multi-user.target), or export with fewer bits"
COPIES = 3  # of a graph's constants while it is built: as parsed, as chosen by the builder, in the engine


@dataclass(frozen=True)
class BuiltEngine:
    """``cached``: it was in the cache already."""

    graph: str
    file: Path
    bytes: int
    cached: bool


def build(path: Path, cache: Path, watch: Callable[[str, str, float], None]) -> Iterator[BuiltEngine]:
    """Builds the engine of each TensorRT graph of the artifact; ``cache`` holds complete ones only.

    Calls ``watch`` with the graph, the phase of its build, and the part of the phase that is done. Raises UserError
    without a driver or TensorRT, for a GPU or a release that the plan refuses, and for a graph that does not build.
    """
    artifact = artifacts.load(path, verify=(FOLDERS["tensorrt"],))
    plan = read_plan(artifact.file(PLAN))
    check_graphs(artifact, plan)
    sm = device_sm()
    check_sm(plan, sm)
    trt = import_tensorrt()
    check_version(trt, plan)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected to write to {cache}, found: {error.strerror}; choose another folder") from None
    for graph in plan.graphs:
        file = engine_file(cache, plan, graph, trt.__version__, sm)
        if not is_intact(file):
            _build_into(file, trt, artifact, plan, graph, sm, watch)
            yield BuiltEngine(graph.name, file, file.stat().st_size, cached=False)
        else:
            yield BuiltEngine(graph.name, file, file.stat().st_size, cached=True)


def _build_into(
    file: Path,
    trt: Any,
    artifact: Artifact,
    plan: BuildPlan,
    graph: GraphPlan,
    sm: int,
    watch: Callable[[str, str, float], None],
) -> None:
    needed = COPIES * sum(artifact.manifest.files[name].size for name in graph.files) + plan.workspace_bytes + FLOOR
    if (free := meminfo()["MemAvailable"]) < needed:
        raise UserError(
            f"expected {needed / 2**30:.1f} GiB of free memory to build {graph.name}, found {free / 2**30:.1f}; "
            f"{ADVICE}"
        )
    swapped = used_swap()
    timings = file.parent / f"timings-{trt.__version__}-sm{sm}.cache"

    def report(phase: str, done: float) -> str | None:
        watch(graph.name, phase, done)
        return short_of_memory(swapped)

    known = timings.read_bytes() if timings.exists() else b""
    engine, measured = build_engine(trt, graph, plan, artifact.path, known, watch=report)
    write_atomically(timings, measured)
    write_atomically(file.with_suffix(".sha256"), hashlib.sha256(engine).hexdigest().encode())
    write_atomically(file, engine)


def write_atomically(file: Path, content: bytes | memoryview) -> None:
    with replace_file(file) as partial:
        partial.write_bytes(content)


def used_swap(root: Path = Path("/")) -> int:
    memory = meminfo(root)
    return memory["SwapTotal"] - memory["SwapFree"]


def short_of_memory(swapped: int, root: Path = Path("/")) -> str | None:
    """Why a build has to be given up; None if it may continue. ``swapped``: bytes in swap before the build."""
    if (more := used_swap(root) - swapped) > SWAPPED:
        return f"the board began to swap ({more >> 20} MiB); {ADVICE}"
    if meminfo(root)["MemAvailable"] < FLOOR:
        return f"less than {FLOOR >> 20} MiB of memory were left; {ADVICE}"
    return None
