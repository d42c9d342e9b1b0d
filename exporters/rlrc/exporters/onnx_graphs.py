"""The ONNX Runtime target: graphs/onnx."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

from rlrc.artifact import Artifact, Draft, GraphSpec
from rlrc.compressor.backbones import build
from rlrc.compressor.checkpoint import check_shapes, read_tensors
from rlrc.errors import UserError
from rlrc.exporters.graphs import FAMILIES
from rlrc.exporters.onnx import DENSE, FLAVOURS, NEEDS, QUANTIZED, Builder, Weights
from rlrc.runtime.backends import FOLDERS

LARGE = 2**30


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
    return FLAVOURS[precision].products != "int8"


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
        builder, file = Builder(weights, FLAVOURS[precision]), f"{FOLDERS['onnxruntime']}/{name}.onnx"
        define(builder, manifest.policy, manifest.towers)
        write_model(builder.model(name), draft.file(file), builder.bytes())
        inputs, outputs = tuple(builder.inputs), tuple(builder.outputs)
        specs.append(GraphSpec(name, "onnxruntime", file, precision, inputs, outputs, NEEDS))
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
