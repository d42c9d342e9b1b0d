"""The ONNX Runtime target: graphs/onnx."""

from __future__ import annotations

from rlrc.artifact import Artifact, Draft, GraphSpec
from rlrc.errors import UserError
from rlrc.exporters.graphs import graphs_of
from rlrc.exporters.onnx import DENSE, FLAVOURS, NEEDS, QUANTIZED, OnnxRuntimeBuilder
from rlrc.exporters.weights import read_weights
from rlrc.runtime.backends import FOLDERS


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


def is_exact(precision: str) -> bool:
    """Whether only the order of floating-point sums tells the graphs' answers from torch's."""
    return FLAVOURS[precision].products in ("float", "int4")


def write_graphs(draft: Draft, parent: Artifact, precision: str) -> tuple[GraphSpec, ...]:
    manifest = parent.manifest
    definitions, weights = graphs_of(manifest.policy.family), read_weights(parent)
    specs = []
    for name, define in definitions.items():
        builder, file = OnnxRuntimeBuilder(weights, FLAVOURS[precision]), f"{FOLDERS['onnxruntime']}/{name}.onnx"
        define(builder, manifest.policy, manifest.towers)
        builder.write(name, draft.file(file))
        inputs, outputs = tuple(builder.inputs), tuple(builder.outputs)
        specs.append(GraphSpec(name, "onnxruntime", file, precision, inputs, outputs, NEEDS))
    return tuple(specs)
