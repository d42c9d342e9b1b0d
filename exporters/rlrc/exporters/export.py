"""The export stage: an artifact in, the same artifact with graphs out, verified on its golden observations."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Final

import onnx
import torch

from rlrc.artifact import Artifact, Draft, FileSpec, GraphSpec, HistoryEntry, Manifest, VerifiedSpec, writing
from rlrc.compressor.backbones import build
from rlrc.compressor.checkpoint import check_shapes, read_tensors
from rlrc.errors import UserError
from rlrc.exporters.graphs import FAMILIES
from rlrc.exporters.onnx import DENSE, FLAVOURS, NEEDS, QUANTIZED, Builder, Weights
from rlrc.folders import sha256
from rlrc.runtime import verify
from rlrc.runtime.policy import LocalPolicy

BACKEND: Final = "onnxruntime"
FOLDER = "graphs/onnx"
LARGE = 2**30


class Disagreement(Exception):
    """The graphs answer otherwise than the torch policy. ``record`` says by how much."""

    def __init__(self, record: VerifiedSpec, reason: str) -> None:
        super().__init__(reason)
        self.record = record


def export(parent: Artifact, out: Path, precision: str | None = None, tolerance: float | None = None) -> Manifest:
    """Writes ``out``: the parent's files and ONNX Runtime's graphs, which replace those it may have.

    ``tolerance`` is the largest error in action units, by default none but at ties (see rlrc.runtime.verify). Raises
    UserError for a bad request, and Disagreement above the tolerance; nothing is written then.
    """
    started = time.process_time()
    precision = choose_precision(parent, precision)
    action = parent.manifest.policy.action
    if tolerance is not None and not tolerance > 0:
        raise UserError(f"expected a positive tolerance in action units, found {tolerance}; leave it out for none")
    with writing(out) as draft:
        kept = [name for name in parent.manifest.files if not Path(name).is_relative_to(FOLDER)]
        draft.inherit(parent, *kept)
        graphs = write_graphs(draft, parent, precision)
        candidate = with_graphs(parent.manifest, draft, graphs)
        golden = verify.read_golden(parent.file(verify.GOLDEN), parent.manifest.policy)
        policy = LocalPolicy(Artifact(draft.path, candidate, digest=""))
        limit = verify.default_tolerance(action) if tolerance is None else tolerance
        record = verify.measure(policy, golden, limit)
        if reason := verify.failure(record):
            raise Disagreement(record, reason)
        others = tuple(other for other in parent.manifest.verified if other.backend != BACKEND)
        entry = HistoryEntry(
            stage="export",
            config={"to": "onnx", "precision": precision, "tolerance": limit},
            version=metadata.version("rlrc"),
            parent=parent.digest,
            cpu_minutes=(time.process_time() - started) / 60,
            after={"graph_bytes": sum(candidate.files[graph.file].size for graph in graphs)},
        )
        history = (*parent.manifest.history, entry)
        return draft.finish(replace(candidate, verified=(*others, record), history=history))


def choose_precision(parent: Artifact, precision: str | None) -> str:
    """The precision asked for, or the default of these weights. Raises UserError for one that they do not have."""
    quantization = parent.manifest.quantization
    choices = DENSE if quantization is None else QUANTIZED[quantization.grid]
    if precision is None:
        return "fp32" if parent.manifest.dtype == "float32" else choices[0]
    if precision not in choices:
        raise UserError(
            f"expected a precision of {', '.join(choices)} for weights in {parent.manifest.dtype}, found {precision}; "
            "choose one of those"
        )
    return precision


def write_graphs(draft: Draft, parent: Artifact, precision: str) -> tuple[GraphSpec, ...]:
    manifest = parent.manifest
    if manifest.policy.family not in FAMILIES:
        raise UserError(
            f"expected a family of {', '.join(FAMILIES)}, found {manifest.policy.family!r}; upgrade rlrc to export it"
        )
    weights = read_weights(parent)
    with torch.device("meta"):
        check_shapes(build(manifest.policy, manifest.towers), weights.shapes(), str(parent.path))
    specs = []
    for name, define in FAMILIES[manifest.policy.family].items():
        builder, file = Builder(weights, FLAVOURS[precision]), f"{FOLDER}/{name}.onnx"
        define(builder, manifest.policy, manifest.towers)
        write_model(builder.model(name), draft.file(file), builder.bytes())
        inputs, outputs = tuple(builder.inputs), tuple(builder.outputs)
        specs.append(GraphSpec(name, BACKEND, file, precision, inputs, outputs, NEEDS))
    return tuple(specs)


def write_model(model: onnx.ModelProto, path: Path, size: int) -> None:
    """One file; where ``size`` bytes of constants come near what protobuf can hold (2 GB), those in one beside it."""
    if size < LARGE:
        path.write_bytes(model.SerializeToString(deterministic=True))
    else:
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data")


def read_weights(artifact: Artifact) -> Weights:
    tensors, manifest = read_tensors(artifact), artifact.manifest
    arrays = {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in tensors.items()}
    wide = {name for name, x in tensors.items() if x.dtype == torch.float32}
    return Weights(arrays, manifest.quantization, frozenset(wide if manifest.dtype == "bfloat16" else ()))


def with_graphs(manifest: Manifest, draft: Draft, graphs: tuple[GraphSpec, ...]) -> Manifest:
    """The manifest with these graphs in place of the backend's, and the draft's present files."""
    paths = (path for path in draft.path.rglob("*") if path.is_file())
    files = {path.relative_to(draft.path).as_posix(): FileSpec(sha256(path), path.stat().st_size) for path in paths}
    others = tuple(graph for graph in manifest.graphs if graph.backend != BACKEND)
    return replace(manifest, graphs=(*others, *graphs), files=files)
