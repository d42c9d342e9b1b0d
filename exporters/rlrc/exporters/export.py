"""The export stage: copy an artifact, add graphs, and verify each set of graphs on the golden observations."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from rlrc.artifact import (
    GOLDEN,
    Artifact,
    Draft,
    FileSpec,
    GraphSpec,
    HistoryEntry,
    Manifest,
    VerifiedSpec,
    create_artifact,
)
from rlrc.artifact.precisions import PRECISIONS
from rlrc.errors import UserError
from rlrc.folders import sha256
from rlrc.npz import write_npz
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.backends import FOLDERS, TARGETS
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.policy import LocalPolicy

MODULES = {
    "onnxruntime": "rlrc.exporters.onnx.target",
    "tensorrt": "rlrc.exporters.tensorrt.target",
    "gguf": "rlrc.exporters.gguf.target",
}
"""By backend. Each chooses a precision and writes the graphs."""


class Disagreement(Exception):
    """The graphs disagree with the torch policy beyond the tolerance; ``record`` has the errors.

    ``worst``: the file with the observation of the largest error and both answers to it.
    """

    def __init__(self, record: VerifiedSpec, reason: str, worst: Path) -> None:
        super().__init__(reason)
        self.record, self.worst = record, worst


def export(
    parent: Artifact,
    out: Path,
    to: Sequence[str] = ("onnx",),
    precision: str | Mapping[str, str] | None = None,
    tolerance: float | None = None,
    reasons: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write ``out``: the parent's files, with the graphs of these targets added or replaced.

    ``precision`` is one for all graphs or, for onnx, one for each by name; ``reasons`` for it go into the history.
    ``tolerance`` is the largest error in action units (default: ``choose_limits``). Raises UserError for a bad request.
    Raises Disagreement beyond the tolerance; then only the worst observation is written.
    """
    started = time.process_time()
    if tolerance is not None and not tolerance > 0:
        raise UserError(
            f"expected a positive tolerance in action units, found {tolerance}; leave it out for the default"
        )
    if not to or not set(to) <= set(TARGETS.values()):
        raise UserError(f"expected targets of {', '.join(TARGETS.values())}, found {' '.join(to) or 'none'}; name some")
    manifest = parent.manifest
    chosen = {
        backend: load_exporter(backend).choose_precision(parent, precision)
        for backend, target in TARGETS.items()
        if target in to
    }
    golden = verify.read_golden(parent.file(GOLDEN), manifest.policy)
    check_room(parent, out, chosen)
    with create_artifact(out) as draft:
        replaced = [FOLDERS[backend] for backend in chosen]
        draft.inherit(parent, *(name for name in manifest.files if not _is_within(name, replaced)))
        written = [
            graph for backend in chosen for graph in load_exporter(backend).write_graphs(draft, parent, chosen[backend])
        ]
        candidate = replace_graphs(manifest, draft, written)
        exported = Artifact(draft.path, candidate, digest="")
        records = [
            check(exported, backend, golden, choose_limits(manifest, backend, name, tolerance), out)
            for backend, name in chosen.items()
        ]
        others = [record for record in manifest.verified if record.backend not in chosen]
        sizes = {TARGETS[b]: sum(candidate.files[g.file].size for g in written if g.backend == b) for b in chosen}
        entry = HistoryEntry(
            stage="export",
            config={"to": list(sizes), "precision": list(chosen.values()), "tolerance": tolerance, **(reasons or {})},
            version=metadata.version("rlrc"),
            parent=parent.digest,
            cpu_minutes=(time.process_time() - started) / 60,
            after={"graph_bytes": sizes},
        )
        history = (*manifest.history, entry)
        return draft.finish(replace(candidate, verified=(*others, *records), history=history))


def check_room(parent: Artifact, out: Path, chosen: Mapping[str, str | Mapping[str, str]]) -> None:
    """Raises UserError if the disk may lack space for the graphs: as much as the weights take, or twice that.

    Twice in fp32 (weights are stored in 16 bits), with two copies of the weights, and for K-quants, which are made from
    a float16 file. The constants of one graph are on the disk a second time until it is written.
    """
    weights = sum(file.size for name, file in parent.manifest.files.items() if name.startswith("weights/"))
    names = [name for each in chosen.values() for name in ([each] if isinstance(each, str) else set(each.values()))]
    each = [weights * (2 if name in ("fp32", "q4_k_m") or "+" in name else 1) for name in names]
    needed = sum(each) + max(each, default=0)
    folder = next(path for path in out.absolute().parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"expected {needed:,} bytes of free space in {folder} for {', '.join(names)}, found {free:,}; "
            "free some, or choose another place or --precision"
        )


def choose_limits(
    manifest: Manifest, backend: str, precision: str | Mapping[str, str], tolerance: float | None
) -> verify.Tolerances:
    """The tolerance asked for, or else the limits of the coarsest precision among the graphs."""
    if tolerance is not None:
        return verify.Tolerances(tolerance)
    names = [precision] if isinstance(precision, str) else precision.values()
    rounding = [PRECISIONS[name] for name in names if backend not in PRECISIONS[name].exact]
    coarsest = sorted(rounding, key=lambda each: each.range_tolerance)[-1].name if rounding else None
    return verify.default_tolerances(manifest.policy.action, coarsest)


def check(
    exported: Artifact, backend: str, golden: verify.Golden, limits: verify.Tolerances, out: Path
) -> VerifiedSpec:
    """Replay the golden observations. Raises Disagreement beyond the limits, after writing the worst observation."""
    policy = LocalPolicy(exported, backend=backend, engine=reference_engine(exported, backend))
    answers = verify.replay(policy, golden)
    record = verify.compare(policy, answers, golden, limits)
    if reason := verify.failure_reason(record):
        worst = out.with_name(f"{out.name}.worst.npz")
        write_npz(worst, **verify.worst_observation(policy.spec, answers, golden, limits))
        raise Disagreement(record, reason, worst)
    return record


def reference_engine(exported: Artifact, backend: str) -> Engine | None:
    """The engine to verify with; None for the backend's own. TensorRT's graphs must be verified without a GPU."""
    if backend != "tensorrt":
        return None
    from rlrc.exporters.tensorrt.cpu_reference import CpuReferenceEngine

    return CpuReferenceEngine(exported)


def load_exporter(backend: str) -> ModuleType:
    """The backend's module, imported on demand: each needs different packages."""
    return import_module(MODULES[backend])


def replace_graphs(manifest: Manifest, draft: Draft, graphs: Sequence[GraphSpec]) -> Manifest:
    """The manifest with these graphs instead of others of the same backends, and the draft's current files."""
    paths = (path for path in draft.path.rglob("*") if path.is_file())
    files = {path.relative_to(draft.path).as_posix(): FileSpec(sha256(path), path.stat().st_size) for path in paths}
    written = {graph.backend for graph in graphs}
    others = [graph for graph in manifest.graphs if graph.backend not in written]
    return replace(manifest, graphs=(*others, *graphs), files=files)


def _is_within(name: str, folders: Sequence[str]) -> bool:
    return any(Path(name).is_relative_to(folder) for folder in folders)
