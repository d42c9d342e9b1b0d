"""The ONNX Runtime target (graphs/onnx)."""

from __future__ import annotations

from collections.abc import Mapping

from rlrc.artifact import Artifact, Draft, GraphSpec, Manifest
from rlrc.artifact.precisions import CHOICES
from rlrc.compressor.models.storage.scratch import Allocate, Scratch
from rlrc.errors import UserError
from rlrc.exporters.graphs import find_graphs
from rlrc.exporters.graphs.weights import Weights, read_weights
from rlrc.exporters.onnx.builder import FORMATS, NEEDS, OnnxRuntimeBuilder
from rlrc.exporters.onnx.mixed import MIXED, PARTS, MixedBuilder
from rlrc.runtime.inference.backends import FOLDERS

Precision = str | Mapping[str, str]
"""One for all graphs, or one for each by name."""


def list_precisions(manifest: Manifest) -> tuple[str, ...]:
    """The precisions available for these weights, the default first."""
    found = CHOICES["onnxruntime"][manifest.quantization.grid if manifest.quantization else "float"]
    if manifest.policy.decode != "autoregressive":
        found = tuple(name for name in found if name != MIXED)
    return ("fp32", *(name for name in found if name != "fp32")) if manifest.dtype == "float32" else found


def choose_precision(parent: Artifact, precision: Precision | None) -> Precision:
    """The precision asked for, or the default. Raises UserError for one that these weights cannot have."""
    known = list_precisions(parent.manifest)
    if precision is None:
        return known[0]
    for name in [precision] if isinstance(precision, str) else precision.values():
        if name not in known:
            raise UserError(
                f"expected a precision of {', '.join(known)} for weights in {parent.manifest.dtype}, found {name}; "
                "choose one of those, or auto"
            )
    return precision


def write_graphs(
    draft: Draft, parent: Artifact, precision: Precision, weights: Weights | None = None
) -> tuple[GraphSpec, ...]:
    """``weights``: used instead of the parent's."""
    manifest = parent.manifest
    weights = read_weights(parent) if weights is None else weights
    specs, allocate = [], Scratch(draft.path).empty
    for name in find_graphs(manifest.policy.family):
        own = precision if isinstance(precision, str) else precision[name]
        builder, file = build_graph(weights, manifest, name, own, allocate), f"{FOLDERS['onnxruntime']}/{name}.onnx"
        builder.write(name, draft.file(file))
        inputs, outputs = tuple(builder.inputs), tuple(builder.outputs)
        specs.append(GraphSpec(name, "onnxruntime", file, own, inputs, outputs, NEEDS))
    return tuple(specs)


def build_graph(
    weights: Weights, manifest: Manifest, graph: str, precision: str, allocate: Allocate | None = None
) -> OnnxRuntimeBuilder:
    """In ``MIXED``, graphs other than the decoder are built in the precision of prompts."""
    if precision == MIXED:
        many, one = (build_graph(weights, manifest, graph, part, allocate) for part in PARTS)
        return MixedBuilder(many, one) if graph == "decoder" else many
    builder = OnnxRuntimeBuilder(weights, FORMATS[precision], allocate)
    find_graphs(manifest.policy.family)[graph](builder, manifest.policy, manifest.towers)
    return builder
