"""Memory of a new process that runs a policy.

The process is measured in four stages: bare interpreter, libraries imported, policy loaded, policy running. The
policy's share is the last stage less the second. Anonymous memory is listed apart from file-backed pages (shared
libraries and mapped weights), which the system may drop and read again. Files that were read and closed stay in the
page cache and belong to no process; ``page_cache`` counts those of the graphs. ``used`` is that of the whole system: on
a Jetson, where CPU and GPU share memory, only this figure includes the GPU's memory.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import Any

from rlrc.runtime.inference.backends import engine as backends_engine

STAGES = ("interpreter", "imported", "loaded", "running")
TIMEOUT_S = 300.0

Process = dict[str, int]


def measure(path: Path, threads: int = 1, inferences: int = 20) -> dict[str, Any]:
    """Stage -> {"rss", "pss", "anonymous", "file", "peak", "used"} in bytes, of a new process.

    ``pss`` counts a page shared by n processes as 1/n; ``peak`` is the largest rss so far; ``used`` is the system's
    memory that is not available. Two more keys: "towers", the increase of pss as each graph is loaded ("all" where the
    backend loads them together), and "page_cache", bytes of the graphs' files in the page cache at the end. Raises
    RuntimeError if the process fails or takes longer than five minutes, or without /proc (not Linux).
    """
    if not Path("/proc/self/smaps_rollup").exists():
        raise RuntimeError("expected /proc/self/smaps_rollup to read memory from, found none; use Linux")
    arguments = map(str, (path.resolve(), threads, inferences))
    command = [sys.executable, "-m", "rlrc.benchmarks.measure.memory", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the process that loads {path.name} did not end within {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"the process that loads {path.name} failed: {reason}")
    stages: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return stages


def row(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measured part of a table row: the run with the median own pss.

    ``own``: what the policy adds to a process that has imported the runtime; ``own_range``: lowest and highest.
    """
    owns = [own_memory(run) for run in runs]
    middle = [one["pss"] for one in owns].index(median_low(one["pss"] for one in owns))
    spread = {key: [min(one[key] for one in owns), max(one[key] for one in owns)] for key in owns[0]}
    return {"memory": {**runs[middle], "own": owns[middle], "own_range": spread, "runs": len(runs)}}


def own_memory(stages: dict[str, Process]) -> Process:
    before, after = stages["imported"], stages["running"]
    increase = {key: after[key] - before[key] for key in ("rss", "pss", "anonymous", "file", "used")}
    # Loading reads and converts weights, so its peak can exceed the final size.
    return {**increase, "peak": after["peak"] - before["rss"]}


def read_process() -> Process:
    """Current memory of this process, in bytes."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    status, system = Path("/proc/self/status").read_text(), Path("/proc/meminfo").read_text()
    rss, pss = _kilobytes(rollup, "Rss"), _kilobytes(rollup, "Pss")
    anonymous = _kilobytes(rollup, "Anonymous")
    return {
        "rss": rss,
        "pss": pss,
        "anonymous": anonymous,
        "file": rss - anonymous,
        "peak": _kilobytes(status, "VmHWM"),
        "used": _kilobytes(system, "MemTotal") - _kilobytes(system, "MemAvailable"),
    }


def page_cache(file: Path) -> int:
    """Bytes of a file that are now in the page cache."""
    size = file.stat().st_size
    if size == 0:
        return 0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start  # otherwise the mapping cannot be closed
    if failed:
        raise RuntimeError(f"mincore failed: cannot determine how much of {file.name} is in the page cache")
    return min(size, sum(page & 1 for page in pages) * mmap.PAGESIZE)


def _kilobytes(text: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"expected {key} in /proc, found none")
    return int(found.group(1)) * 1024


def _measure_stages(path: str, threads: int, inferences: int) -> dict[str, Any]:
    stages: dict[str, Any] = {"interpreter": read_process()}

    import numpy as np  # not at the top: the memory of imports is measured

    from rlrc.runtime.inference.backends import onnxruntime  # noqa: F401
    from rlrc.runtime.inference.policy import LocalPolicy

    stages["imported"] = read_process()

    policy, stages["towers"] = _load(Path(path), threads)
    stages["loaded"] = read_process()
    assert isinstance(policy, LocalPolicy)
    spec = policy.spec
    observation: dict[str, Any] = {"instruction": "move"}
    for camera in spec.cameras:
        observation[f"image.{camera.name}"] = np.zeros((camera.height, camera.width, 3), np.uint8)
    if spec.state:
        observation["state"] = np.zeros(len(spec.state.names), np.float32)
    for _ in range(inferences):
        policy.infer(observation)
    stages["running"] = read_process()

    from rlrc.benchmarks.results.results import graph_files  # imported last, or it would count as the policy's memory

    files = [policy.artifact.path / file for file in graph_files(policy.artifact.manifest)]
    stages["page_cache"] = sum(page_cache(file) for file in files)
    return stages


def _load(path: Path, threads: int) -> tuple[Any, dict[str, int]]:
    """The policy, and the increase of pss by graph where the backend can load graphs separately."""
    from rlrc import artifact as artifacts
    from rlrc.runtime.inference import backends
    from rlrc.runtime.inference.policy import LocalPolicy, runtime_folders

    artifact = artifacts.load(path, verify=())
    backend = backends.choose(artifact.manifest, None, path)
    artifact.verify(*runtime_folders(backend))
    engines: dict[str, backends_engine.Engine] = {}
    increase: dict[str, int] = {}

    def load(name: str, graphs: tuple[Any, ...]) -> backends_engine.Engine:
        before = read_process()["pss"]
        alone = replace(artifact, manifest=replace(artifact.manifest, graphs=graphs))
        engine = backends.open_engine(alone, backend, threads)
        increase[name] = read_process()["pss"] - before
        return engine

    if backend != "onnxruntime":
        return LocalPolicy(artifact, threads, backend, load("all", artifact.manifest.graphs)), increase
    for graph in artifact.manifest.graphs:
        if graph.backend == backend:
            engines[graph.name] = load(graph.name, (graph,))
    return LocalPolicy(artifact, threads, backend, _EnginePerGraph(engines)), increase


class _EnginePerGraph:
    """One engine that runs every graph on a separate engine."""

    def __init__(self, engines: dict[str, Any]) -> None:
        self._engines = engines

    def run(self, graph: str, inputs: Any) -> Any:
        return self._engines[graph].run(graph, inputs)

    def versions(self) -> dict[str, str]:
        return dict(next(iter(self._engines.values())).versions())


if __name__ == "__main__":
    print(json.dumps(_measure_stages(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
