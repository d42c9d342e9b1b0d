"""Check latency and memory at full model size without a checkpoint: neither depends on the values of the weights.

A dense policy with random weights and its pruned, 4-bit version are exported for one runtime and run alternately
(A B A B), each in a separate process. The compressed policy and the dense one in torch follow (C B C B). Success is not
measured. Creating the files needs torch and the exporters' packages.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc.artifact import Artifact, Manifest
from rlrc.artifact.precisions import PRECISIONS
from rlrc.benchmarks.claims import full_size_result, policy_process, roofline
from rlrc.benchmarks.claims.claims import Thresholds
from rlrc.benchmarks.claims.full_size_result import WORDS, InterleavedTrials
from rlrc.benchmarks.claims.operating_points import OperatingPoint
from rlrc.benchmarks.claims.policy_process import ActionTimes, PolicyProcess
from rlrc.errors import UserError
from rlrc.jetson.model.devices import CPU, Device
from rlrc.jetson.model.plan import Setting, prune
from rlrc.processes import WorkerPool

COMPRESSED = 0.75  # bytes a parameter, most of them in 4 bits
ROOM = 1e9  # bytes of memory besides the weights: libraries and activations of two processes
WRITING_S = 3600.0  # time limit for writing up to 15 GB
PATIENCE_S = 1800.0  # how long to wait for memory that other programs use
FAULTS = 1000  # pages of weights that an action may read from disk: 4 MB
REPEATED = 20  # most rounds that may be repeated
Step = Callable[[str], None]
Starters = Mapping[str, Callable[[], PolicyProcess]]


@dataclass(frozen=True)
class PolicyPair:
    """Manifests of the two artifacts before files exist. ``modules``: parameters of each module of the dense policy."""

    dense: Manifest
    compressed: Manifest
    modules: Mapping[str, int]


def describe(point: OperatingPoint) -> PolicyPair:
    """The manifests of an operating point. Imports torch to build the modules without data."""
    from rlrc.benchmarks.claims import random_weights

    spec, towers = random_weights.dense(point.name)
    device = Device(CPU, "this machine", "any", None, {}, 1.0, 0, None)
    cut = prune(Setting(point.name, spec, towers, PRECISIONS["bf16"], device), point.prune).towers
    return PolicyPair(
        random_weights.manifest(spec, towers),
        random_weights.manifest(*random_weights.compressed(spec, cut), point.eight),
        random_weights.modules(spec, towers),
    )


# Disk and memory


def check_disk(point: OperatingPoint, pair: PolicyPair, folder: Path) -> None:
    """Raises UserError if the disk is too small for the graphs."""
    compressed = pair.compressed.parameters * (2 if point.elsewhere else 1)  # at most one byte a parameter
    disk = 1.05 * (2 * pair.dense.parameters + compressed)
    if (free := shutil.disk_usage(folder).free) < disk:
        raise UserError(
            f"expected {disk / 1e9:.1f} GB of room in {folder} for the graphs of {point.name}, found "
            f"{free / 1e9:.1f} GB; free some space, or choose another folder with --work"
        )


def bytes_needed(pair: PolicyPair, weights: float) -> float:
    """Bytes of memory for a dense policy with ``weights`` bytes in memory and the compressed one at the same time."""
    return weights + COMPRESSED * pair.compressed.parameters + ROOM


def check_memory(point: OperatingPoint, size: float) -> None:
    """Raises UserError if less than ``size`` bytes of memory are available."""
    if (free := available()) < size:
        advice = "close other programs" if size < total() else "use a larger machine, or another --runtime"
        raise UserError(
            f"expected {size / 1e9:.1f} GB of memory for {point.name} on {point.runtime}, found {free / 1e9:.1f} GB; "
            f"{advice}"
        )


def wait_for_memory(point: OperatingPoint, size: float, step: Step) -> None:
    """Wait until ``size`` bytes are available: other programs may have taken memory while the graphs were written.

    Raises UserError after ``PATIENCE_S`` seconds.
    """
    until = time.monotonic() + PATIENCE_S
    while available() < size and time.monotonic() < until:
        step(f"waiting for {size / 1e9:.1f} GB of memory, {available() / 1e9:.1f} GB are free")
        time.sleep(min(PATIENCE_S, 10.0))
    check_memory(point, size)


def weight_bytes(point: OperatingPoint, pair: PolicyPair) -> float:
    """Bytes of the dense policy's weights in memory: float16 in llama.cpp, widened to float32 in ONNX Runtime.

    Word embeddings stay in float16. The files behind widened weights do not count: the page cache can drop them.
    """
    narrow = pair.modules["embedding"] + (pair.modules["decoder"] if point.runtime == "gguf" else 0)
    return 2.0 * narrow + 4.0 * (pair.dense.parameters - narrow)


def choose_torch_type(pair: PolicyPair, step: Step) -> tuple[str, float]:
    """The faster type of the dense policy in torch on this machine, "fp32" or "bf16", and the bytes that it needs.

    If float32 does not fit into memory, bfloat16 is chosen.
    """
    with WorkerPool(1) as worker:
        ((_, kind),) = worker.run(policy_process.faster_torch_type, [None])
    wide = bytes_needed(pair, 4.0 * pair.dense.parameters)
    if kind == "fp32" and wide > total():
        step(f"torch is faster in fp32 but would need {wide / 1e9:.1f} GB: it is measured in bf16")
        kind = "bf16"
    return kind, wide if kind == "fp32" else bytes_needed(pair, 2.0 * pair.dense.parameters)


def available() -> float:
    """Bytes of memory available to programs."""
    return _meminfo("MemAvailable")


def total() -> float:
    return _meminfo("MemTotal")


def _meminfo(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return float("inf") if found is None else 1024.0 * int(found[1])


# Export and measurement


def make(point: OperatingPoint, pair: PolicyPair, folder: Path, step: Step) -> dict[str, Artifact]:
    """Write the two artifacts, and the compressed one for a second runtime if the operating point has one."""
    from rlrc.benchmarks.claims import random_weights

    graphs: dict[str, tuple[Manifest, str, Any]] = {"compressed": (pair.compressed, point.runtime, point.compressed)}
    if point.elsewhere is not None:
        graphs["elsewhere"] = (pair.compressed, *point.elsewhere)
    graphs["dense"] = (pair.dense, point.runtime, point.dense)
    artifacts = {}
    with WorkerPool(1) as worker:  # a process does not always return freed memory to the system
        for name, (manifest, runtime, precision) in graphs.items():
            step(f"writing graphs for {runtime}, {name} ({manifest.parameters / 1e9:.2f} billion parameters)")
            job = (folder / name, manifest, runtime, precision)
            (artifacts[name],) = (artifact for _, artifact in worker.run(random_weights.write_job, [job], WRITING_S))
    return artifacts


def run_interleaved(starters: Starters, rounds: int, step: Step, in_torch: str = "") -> InterleavedTrials:
    """One action of every process a round, after an uncounted one; ``in_torch``: the type that torch computes in.

    A round that reads weights from disk again, because memory is short, is repeated. Raises UserError after more than
    ``REPEATED`` repetitions.
    """
    with start_processes(starters, step) as processes:
        trials = InterleavedTrials({name: [] for name in processes})
        for name, process in processes.items():
            step(f"first action of {name}")
            process.act()
        while len(trials.load) < rounds:
            load, done = round(os.getloadavg()[0], 2), dict[str, ActionTimes]()
            for name, process in processes.items():
                step(f"round {len(trials.load) + 1} of {rounds}: {name}")
                done[name] = process.act()
            if max(action.faults for action in done.values()) > FAULTS:
                trials.repeated += 1
                step(f"round {len(trials.load) + 1} is repeated: memory was short")
                if trials.repeated > REPEATED:
                    raise UserError(
                        f"expected memory for all weights at once, found that {trials.repeated} rounds had to read "
                        "them from the disk again; close other programs"
                    )
                continue
            trials.load.append(load)
            for name, action in done.items():
                trials.actions[name].append(action)
        for name, process in processes.items():
            trials.memory[name] = process.memory()
        if in_torch:
            trials.peak = processes["torch"].peak(in_torch)
    return trials


@contextmanager
def start_processes(starters: Starters, step: Step) -> Iterator[dict[str, PolicyProcess]]:
    """Start every process; stop them all at the end of the block."""
    started = dict[str, PolicyProcess]()
    try:
        for name, start in starters.items():
            step(f"loading {name}")
            started[name] = start()
        yield started
    finally:
        for process in started.values():
            process.close()


def make_starters(artifacts: Mapping[str, Artifact], threads: int) -> dict[str, Callable[[], PolicyProcess]]:
    def make_starter(name: str) -> Callable[[], PolicyProcess]:
        return lambda: PolicyProcess(
            f"the {name} policy", policy_process.open_exported, (str(artifacts[name].path), threads, WORDS)
        )

    return {name: make_starter(name) for name in artifacts}


def run(
    point: OperatingPoint, folder: Path, threads: int, rounds: int, in_torch: bool, limits: Thresholds, step: Step
) -> dict[str, Any]:
    """Write the artifacts to ``folder``, measure and delete them; -> the result. Raises UserError if space is short."""
    step("shapes")
    pair = describe(point)
    check_disk(point, pair, folder)
    exported_bytes = bytes_needed(pair, weight_bytes(point, pair))
    kind, torch_bytes = choose_torch_type(pair, step) if in_torch else ("", 0.0)
    check_memory(point, max(exported_bytes, torch_bytes))
    try:
        artifacts = make(point, pair, folder, step)
        step("memory bandwidth and matrix products of this machine")
        peaks = [roofline.measure(threads)]
        starters = make_starters(artifacts, threads)
        wait_for_memory(point, exported_bytes, step)
        trials = run_interleaved({name: starters[name] for name in ("dense", "compressed")}, rounds, step)
        shutil.rmtree(artifacts["dense"].path)
        peaks.append(roofline.measure(threads))
        other: InterleavedTrials | UserError | None = None
        if in_torch:
            given = (pair.dense.policy, pair.dense.towers, threads, WORDS, kind)
            starters["torch"] = lambda: PolicyProcess("the dense policy in torch", policy_process.open_in_torch, given)
            competing = ("torch", "compressed", *(["elsewhere"] if point.elsewhere else []))
            try:  # an error here must not lose the measurements so far
                wait_for_memory(point, torch_bytes, step)
                other = run_interleaved({name: starters[name] for name in competing}, rounds, step, kind)
                peaks += [roofline.measure(threads), roofline.Peaks(0.0, {kind: other.peak})]
            except UserError as error:
                other = error
        return full_size_result.result(point, artifacts, trials, other, kind, roofline.best(peaks), threads, limits)
    finally:
        for name in ("dense", "compressed", "elsewhere"):
            shutil.rmtree(folder / name, ignore_errors=True)
