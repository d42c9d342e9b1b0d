"""The export stage: an artifact in, the same artifact with graphs out, each set verified on the golden observations."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from rlrc.artifact import GOLDEN, Artifact, Draft, FileSpec, GraphSpec, HistoryEntry, Manifest, VerifiedSpec, writing
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
    """The graphs answer otherwise than the torch policy. ``record`` says by how much.

    ``worst``: the file with the observation that they differ on most, both answers beside it.
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
    """Writes ``out``: the parent's files and the targets' graphs, which replace those it may have.

    ``precision`` is one for all graphs or, of onnx, one for each; ``reasons`` for it go into the history. ``tolerance``
    is the largest error in action units, by default that of ``limits``. Raises UserError for a bad request,
    and Disagreement above the tolerance; nothing is written then but the worst observation.
    """
    started = time.process_time()
    if tolerance is not None and not tolerance > 0:
        raise UserError(f"expected a positive tolerance in action units, found {tolerance}; leave it out for none")
    if not to or not set(to) <= set(TARGETS.values()):
        raise UserError(f"expected targets of {', '.join(TARGETS.values())}, found {' '.join(to) or 'none'}; name some")
    manifest = parent.manifest
    chosen = {
        backend: exporter(backend).choose_precision(parent, precision)
        for backend, target in TARGETS.items()
        if target in to
    }
    golden = verify.read_golden(parent.file(GOLDEN), manifest.policy)
    check_room(parent, out, chosen)
    with writing(out) as draft:
        replaced = [FOLDERS[backend] for backend in chosen]
        draft.inherit(parent, *(name for name in manifest.files if not _lies_in(name, replaced)))
        written = [
            graph for backend in chosen for graph in exporter(backend).write_graphs(draft, parent, chosen[backend])
        ]
        candidate = with_graphs(manifest, draft, written)
        exported = Artifact(draft.path, candidate, digest="")
        records = [
            check(exported, backend, golden, limits(manifest, backend, name, tolerance), out)
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
    """Raises UserError where the disk has less room than the graphs may take: as much as the weights, or twice that.

    Twice: in fp32, where they are stored in 16 bits; with two copies of them; and for K-quants, made of a wide file.
    """
    weights = sum(file.size for name, file in parent.manifest.files.items() if name.startswith("weights/"))
    names = [name for each in chosen.values() for name in ([each] if isinstance(each, str) else set(each.values()))]
    needed = sum(weights * (2 if name in ("fp32", "q4_k_m") or "+" in name else 1) for name in names)
    folder = next(path for path in out.absolute().parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise UserError(
            f"expected {needed:,} bytes of room in {folder} for {', '.join(names)}, found {free:,}; "
            "make some, or choose another place or --precision"
        )


def limits(
    manifest: Manifest, backend: str, precision: str | Mapping[str, str], tolerance: float | None
) -> verify.Tolerances:
    """What the graphs may differ by: what was asked for, or what this precision should keep to, the coarsest of all."""
    if tolerance is not None:
        return verify.Tolerances(tolerance)
    names = [precision] if isinstance(precision, str) else precision.values()
    rounding = [PRECISIONS[name] for name in names if backend not in PRECISIONS[name].exact]
    coarsest = sorted(rounding, key=lambda each: each.range_tolerance)[-1].name if rounding else None
    return verify.default_limits(manifest.policy.action, coarsest)


def check(
    exported: Artifact, backend: str, golden: verify.Golden, limits: verify.Tolerances, out: Path
) -> VerifiedSpec:
    """Replays the golden observations. Raises Disagreement beyond the limits, the worst observation written."""
    policy = LocalPolicy(exported, backend=backend, engine=reference_engine(exported, backend))
    answers = verify.replay(policy, golden)
    record = verify.compare(policy, answers, golden, limits)
    if reason := verify.failure(record):
        worst = out.with_name(f"{out.name}.worst.npz")
        write_npz(worst, **verify.worst(policy.spec, answers, golden, limits))
        raise Disagreement(record, reason, worst)
    return record


def reference_engine(exported: Artifact, backend: str) -> Engine | None:
    """The engine that replays the graphs here; None: their own. TensorRT's graphs have to be verified without a GPU."""
    if backend != "tensorrt":
        return None
    from rlrc.exporters.tensorrt.cpu_reference import CpuReferenceEngine

    return CpuReferenceEngine(exported)


def exporter(backend: str) -> ModuleType:
    """Imported when asked for: each needs packages of its own."""
    return import_module(MODULES[backend])


def with_graphs(manifest: Manifest, draft: Draft, graphs: Sequence[GraphSpec]) -> Manifest:
    """The manifest with these graphs in place of their backends', and the draft's present files."""
    paths = (path for path in draft.path.rglob("*") if path.is_file())
    files = {path.relative_to(draft.path).as_posix(): FileSpec(sha256(path), path.stat().st_size) for path in paths}
    written = {graph.backend for graph in graphs}
    others = [graph for graph in manifest.graphs if graph.backend not in written]
    return replace(manifest, graphs=(*others, *graphs), files=files)


def _lies_in(name: str, folders: Sequence[str]) -> bool:
    return any(Path(name).is_relative_to(folder) for folder in folders)
