"""The claims at a real size without a checkpoint: latency and memory do not depend on the weights' values.

A dense policy with random weights and the same, pruned and in 4 bits, are exported for one runtime and make actions in
turns, A B A B, each in a process of its own; then the compressed one and the dense one in torch do, C B C B. Success
is not measured. Needs torch and the exporters' packages to make the files.
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
ROOM = 1e9  # bytes of memory beside the weights: two processes with their libraries, activations
WRITING_S = 3600.0  # at most, for 15 GB
PATIENCE_S = 1800.0  # with others that take the memory meanwhile
FAULTS = 1000  # pages of weights that a round may read from the disk: 4 MB
REPEATED = 20  # rounds, at most
Step = Callable[[str], None]


@dataclass(frozen=True)
class Both:
    """The two artifacts' descriptions, before there are files. ``modules``: parameters of each of the dense one's."""

    dense: Manifest
    compressed: Manifest
    modules: Mapping[str, int]


def describe(point: OperatingPoint) -> Both:
    """Imports torch, for the families' modules; nothing has data."""
    from rlrc.benchmarks.claims import random_weights

    spec, towers = random_weights.dense(point.name)
    device = Device(CPU, "this machine", "any", None, {}, 1.0, 0, None)
    cut = prune(Setting(point.name, spec, towers, PRECISIONS["bf16"], device), point.prune).towers
    return Both(
        random_weights.manifest(spec, towers),
        random_weights.manifest(*random_weights.compressed(spec, cut), point.eight),
        random_weights.modules(spec, towers),
    )


# What there must be room for


def check_disk(point: OperatingPoint, both: Both, folder: Path) -> None:
    """Raises UserError where the disk is too small for the graphs."""
    left = both.compressed.parameters * (2 if point.elsewhere else 1)  # no more than a byte each
    disk = 1.05 * (2 * both.dense.parameters + left)
    if (free := shutil.disk_usage(folder).free) < disk:
        raise UserError(
            f"expected {disk / 1e9:.1f} GB of room in {folder} for the graphs of {point.name}, found "
            f"{free / 1e9:.1f} GB; make some, or choose another place with --work"
        )


def bytes_needed(both: Both, weights: float) -> float:
    """Bytes of memory for a dense policy with so many bytes of weights at work, and the compressed one beside it."""
    return weights + COMPRESSED * both.compressed.parameters + ROOM


def check_memory(point: OperatingPoint, size: float) -> None:
    """Raises UserError where less memory is available."""
    if (free := available()) < size:
        advice = "end other programs" if size < total() else "use a larger machine, or another --runtime"
        raise UserError(
            f"expected {size / 1e9:.1f} GB of memory for {point.name} on {point.runtime}, found {free / 1e9:.1f} GB; "
            f"{advice}"
        )


def wait_for_memory(point: OperatingPoint, size: float, step: Step) -> None:
    """Until so much is available: others may have taken it while the graphs were made, and may soon give it back.

    Raises UserError if they do not.
    """
    until = time.monotonic() + PATIENCE_S
    while available() < size and time.monotonic() < until:
        step(f"waiting for {size / 1e9:.1f} GB of memory, {available() / 1e9:.1f} GB are free")
        time.sleep(min(PATIENCE_S, 10.0))
    check_memory(point, size)


def resident(point: OperatingPoint, both: Both) -> float:
    """Bytes of the dense policy's weights at work: float16 in llama.cpp, widened to float32 in ONNX Runtime.

    Word embeddings stay in float16; the widened ones' files are read through the page cache, which needs no room.
    """
    narrow = both.modules["embedding"] + (both.modules["decoder"] if point.runtime == "gguf" else 0)
    return 2.0 * narrow + 4.0 * (both.dense.parameters - narrow)


def strongest(both: Both, step: Step) -> tuple[str, float]:
    """The type of the dense policy in torch, "fp32" or "bf16", and the bytes that it needs: the quicker one here.

    Float32 that this machine has no memory for cannot compete: bfloat16 is then the strongest that runs.
    """
    with WorkerPool(1) as worker:
        ((_, kind),) = worker.run(policy_process.quicker_in_torch, [None])
    wide = bytes_needed(both, 4.0 * both.dense.parameters)
    if kind == "fp32" and wide > total():
        step(f"torch is quicker in fp32 here, but that needs {wide / 1e9:.1f} GB: it is measured in bf16")
        kind = "bf16"
    return kind, wide if kind == "fp32" else bytes_needed(both, 2.0 * both.dense.parameters)


def available() -> float:
    """Bytes of memory that programs can have."""
    return _meminfo("MemAvailable")


def total() -> float:
    return _meminfo("MemTotal")


def _meminfo(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return float("inf") if found is None else 1024.0 * int(found[1])


# Making and measuring


def make(point: OperatingPoint, both: Both, folder: Path, step: Step) -> dict[str, Artifact]:
    """The two artifacts, and the compressed one for another runtime where it has one."""
    from rlrc.benchmarks.claims import random_weights

    graphs: dict[str, tuple[Manifest, str, Any]] = {"compressed": (both.compressed, point.runtime, point.compressed)}
    if point.elsewhere is not None:
        graphs["elsewhere"] = (both.compressed, *point.elsewhere)
    graphs["dense"] = (both.dense, point.runtime, point.dense)
    found = {}
    with WorkerPool(1) as worker:  # what a process has freed it does not always give back
        for name, (manifest, runtime, precision) in graphs.items():
            step(f"writing graphs for {runtime}, {name} ({manifest.parameters / 1e9:.2f} billion parameters)")
            job = (folder / name, manifest, runtime, precision)
            (found[name],) = (artifact for _, artifact in worker.run(random_weights.write_job, [job], WRITING_S))
    return found


def turns(
    opened: Mapping[str, Callable[[], PolicyProcess]], rounds: int, step: Step, in_torch: str = ""
) -> InterleavedTrials:
    """Every arm one action a round, after one that is not counted; ``in_torch``: the type that torch computes in.

    A round in which weights had to be read from the disk again, for others needed the memory, is repeated. Raises
    UserError if that goes on.
    """
    with running(opened, step) as arms_:
        trials = InterleavedTrials({name: [] for name in arms_})
        for name, arm in arms_.items():
            step(f"first action of {name}")
            arm.act()
        while len(trials.load) < rounds:
            load, done = round(os.getloadavg()[0], 2), dict[str, ActionTimes]()
            for name, arm in arms_.items():
                step(f"round {len(trials.load) + 1} of {rounds}: {name}")
                done[name] = arm.act()
            if max(action.faults for action in done.values()) > FAULTS:
                trials.repeated += 1
                step(f"round {len(trials.load) + 1} is repeated: memory was short")
                if trials.repeated > REPEATED:
                    raise UserError(
                        f"expected memory for all weights at once, found that {trials.repeated} rounds had to read "
                        "them from the disk again; end other programs"
                    )
                continue
            trials.load.append(load)
            for name, action in done.items():
                trials.actions[name].append(action)
        for name, arm in arms_.items():
            trials.memory[name] = arm.memory()
        if in_torch:
            trials.peak = arms_["torch"].peak(in_torch)
    return trials


@contextmanager
def running(opened: Mapping[str, Callable[[], PolicyProcess]], step: Step) -> Iterator[dict[str, PolicyProcess]]:
    started = dict[str, PolicyProcess]()
    try:
        for name, start in opened.items():
            step(f"loading {name}")
            started[name] = start()
        yield started
    finally:
        for arm in started.values():
            arm.close()


def starts(artifacts: Mapping[str, Artifact], threads: int) -> dict[str, Callable[[], PolicyProcess]]:
    def start(name: str) -> Callable[[], PolicyProcess]:
        return lambda: PolicyProcess(
            f"the {name} policy", policy_process.open_exported, (str(artifacts[name].path), threads, WORDS)
        )

    return {name: start(name) for name in artifacts}


def run(
    point: OperatingPoint, folder: Path, threads: int, rounds: int, in_torch: bool, limits: Thresholds, step: Step
) -> dict[str, Any]:
    """Makes both in ``folder``, measures, deletes them, and gives the result. Raises UserError without room."""
    step("shapes")
    both = describe(point)
    check_disk(point, both, folder)
    own, (kind, torchs) = bytes_needed(both, resident(point, both)), strongest(both, step) if in_torch else ("", 0.0)
    check_memory(point, max(own, torchs))
    try:
        artifacts = make(point, both, folder, step)
        step("bandwidth and products of this machine")
        peaks = [roofline.measure(threads)]
        opened = starts(artifacts, threads)
        wait_for_memory(point, own, step)
        pair = turns({name: opened[name] for name in ("dense", "compressed")}, rounds, step)
        shutil.rmtree(artifacts["dense"].path)
        peaks.append(roofline.measure(threads))
        other: InterleavedTrials | UserError | None = None
        if in_torch:
            given = (both.dense.policy, both.dense.towers, threads, WORDS, kind)
            opened["torch"] = lambda: PolicyProcess("the dense policy in torch", policy_process.open_in_torch, given)
            competing = ("torch", "compressed", *(["elsewhere"] if point.elsewhere else []))
            try:  # what was measured before is not lost with it
                wait_for_memory(point, torchs, step)
                other = turns({name: opened[name] for name in competing}, rounds, step, kind)
                peaks += [roofline.measure(threads), roofline.Peaks(0.0, {kind: other.peak})]
            except UserError as error:
                other = error
        return full_size_result.result(point, artifacts, pair, other, kind, roofline.best(peaks), threads, limits)
    finally:
        for name in ("dense", "compressed", "elsewhere"):
            shutil.rmtree(folder / name, ignore_errors=True)
