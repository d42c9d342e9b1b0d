"""Engines on the device: built once for each graph, release of TensorRT and GPU, and kept in a cache.

An engine's file is named by a hash of all that it depends on, so that a cache may hold those of many artifacts and
survives an upgrade. The timings of kernels are kept beside the engines, which makes the next build of a like graph
shorter. Jetsons share one memory between CPU and GPU: a build that leaves less than ``FLOOR``, or that makes the board
swap, is given up, before the kernel's OOM killer chooses a process. Swap is no way out: what the GPU uses cannot be
swapped, so that everything else is, and a build of minutes takes hours.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc import artifact as artifacts
from rlrc.artifact import Artifact
from rlrc.errors import UserError
from rlrc.folders import replacing, sha256
from rlrc.jetson.build_plan import PLAN, BuildPlan, GraphPlan, read_plan
from rlrc.jetson.engines import build_engine, check_version
from rlrc.runtime.backends import FOLDERS
from rlrc.runtime.jetson_telemetry import meminfo
from rlrc.strict import encode

FLOOR = 256 * 2**20
SWAPPED = 64 * 2**20  # what may be swapped meanwhile: the kernel puts away what nobody has used for long
ADVICE = "end other programs and the desktop (sudo systemctl isolate multi-user.target), or export with fewer bits"
COPIES = 3  # of a graph's constants while it is built: as parsed, as chosen by the builder, in the engine
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Engine:
    """``cached``: it was there already."""

    graph: str
    file: Path
    bytes: int
    cached: bool


def build(path: Path, cache: Path, watch: Callable[[str, str, float], None]) -> Iterator[Engine]:
    """The engine of every TensorRT graph of the artifact, one after the other; whole ones only ever lie in ``cache``.

    ``watch`` is called with the graph, the phase of its build and the part of that which is done. Raises UserError
    without a driver or TensorRT, for a GPU or a release that the plan refuses, and for a graph that does not build.
    """
    artifact = artifacts.load(path, verify=(FOLDERS["tensorrt"],))
    plan = read_plan(artifact.file(PLAN))
    check_graphs(artifact, plan)
    sm = device_sm()
    check_sm(plan, sm)
    trt = tensorrt()
    check_version(trt, plan)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected to write to {cache}, found: {error.strerror}; choose another folder") from None
    for graph in plan.graphs:
        file = cache / f"{graph.name}-{engine_key(plan, graph, trt.__version__, sm)}.engine"
        if not is_whole(file):
            _build_into(file, trt, artifact, plan, graph, sm, watch)
            yield Engine(graph.name, file, file.stat().st_size, cached=False)
        else:
            yield Engine(graph.name, file, file.stat().st_size, cached=True)


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

    def watched(phase: str, done: float) -> str | None:
        watch(graph.name, phase, done)
        return short_of_memory(swapped)

    known = timings.read_bytes() if timings.exists() else b""
    engine, measured = build_engine(trt, graph, plan, artifact.path, known, watch=watched)
    write_whole(timings, measured)
    write_whole(file.with_suffix(".sha256"), hashlib.sha256(engine).hexdigest().encode())
    write_whole(file, engine)


def check_graphs(artifact: Artifact, plan: BuildPlan) -> None:
    """Raises UserError unless the plan is of the very graphs in the artifact."""
    for graph in plan.graphs:
        for name, expected in graph.files.items():
            if (found := sha256(artifact.file(name))) != expected:
                raise UserError(f"expected {name} with the sha256 {expected}, found {found}; run rlrc export again")


def check_sm(plan: BuildPlan, sm: int) -> None:
    if sm < plan.least_sm:
        raise UserError(
            f"expected a GPU of SM {_told(plan.least_sm)} or later for {plan.precision}, found SM {_told(sm)}; "
            "export the artifact with another --precision"
        )


def _told(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"


def engine_key(plan: BuildPlan, graph: GraphPlan, version: str, sm: int) -> str:
    """Of the graph's files, its profiles, the builder's settings, the release of TensorRT and the GPU."""
    parts = [encode(graph), plan.precision, plan.workspace_bytes, version, sm]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_whole(file: Path) -> bool:
    """Whether the engine is there and as it was written."""
    told = file.with_suffix(".sha256")
    return file.exists() and told.exists() and told.read_text() == sha256(file)


def write_whole(file: Path, content: bytes | memoryview) -> None:
    with replacing(file) as partial:
        partial.write_bytes(content)


def used_swap(root: Path = Path("/")) -> int:
    told = meminfo(root)
    return told["SwapTotal"] - told["SwapFree"]


def short_of_memory(swapped: int, root: Path = Path("/")) -> str | None:
    """Why a build has to be given up, in words; None if it may go on. ``swapped``: bytes before it began."""
    if (more := used_swap(root) - swapped) > SWAPPED:
        return f"the board began to swap ({more >> 20} MiB); {ADVICE}"
    if meminfo(root)["MemAvailable"] < FLOOR:
        return f"less than {FLOOR >> 20} MiB of memory were left; {ADVICE}"
    return None


# The device. The driver is asked before TensorRT is: without one, TensorRT may end the process.


def device_sm() -> int:
    """Compute capability of the first GPU, 87 for 8.7. Raises UserError without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UserError(
            "expected NVIDIA's driver (libcuda.so.1), found none; run rlrc jetson build on the device itself"
        ) from None
    if (code := driver.cuInit(0)) != 0:
        raise UserError(f"expected a GPU that starts, found error {code} of cuInit; see nvidia-smi or dmesg")
    numbers = [ctypes.c_int() for _ in (MAJOR, MINOR)]
    for number, attribute in zip(numbers, (MAJOR, MINOR), strict=True):
        if (code := driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)) != 0:
            raise UserError(f"expected a GPU, found error {code} of cuDeviceGetAttribute; see nvidia-smi or dmesg")
    return numbers[0].value * 10 + numbers[1].value


def tensorrt() -> Any:
    """TensorRT's module. Raises UserError where it cannot be imported."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise UserError(
            f"expected the module tensorrt, found: {error}; JetPack brings it for the system's Python: make the "
            "environment with --system-site-packages"
        ) from None
