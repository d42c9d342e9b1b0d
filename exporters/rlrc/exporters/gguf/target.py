"""The llama.cpp target (graphs/gguf): the decoder's blocks are a GGUF file, the graphs around them ONNX.

The graph "decoder" has the inputs and outputs that it has in ONNX, except the past, which stays in llama.cpp. Its file
holds the blocks only: the engine computes "embed", the blocks and "head" in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlrc.artifact import Artifact, Draft, GraphSpec, Manifest, TensorSpec, TowerSpec
from rlrc.artifact.precisions import CHOICES
from rlrc.compressor.models.storage.scratch import Scratch
from rlrc.errors import UserError
from rlrc.exporters.gguf import file as gguf_file
from rlrc.exporters.graphs import Define, openvla, tiny
from rlrc.exporters.graphs.weights import Weights, read_weights
from rlrc.exporters.onnx.builder import FORMATS, NEEDS, OnnxRuntimeBuilder
from rlrc.runtime.inference.backends import FOLDERS, llama_model

FAMILIES: Mapping[str, Mapping[str, Define]] = {
    "tiny": {"vision": tiny.vision, **tiny.ENDS},
    "openvla": {"vision": openvla.vision, **openvla.ENDS},
    "openvla-oft": {"vision": openvla.vision, **openvla.OFT_ENDS},
}
EXPERT = "an expert that reads the prefix's keys and values, which stay in llama.cpp"
OTHERS = {
    "act": "LayerNorms and cross-attention",
    "pi0": EXPERT,
    "pi05": EXPERT,
    "smolvla": EXPERT,
}
AROUND = {"int4": "int4", "int4a8": "int4a8", "int8+int4": "int8-rows", "int8": "w8"}
"""The ONNX precision of the graphs around the blocks, of quantized weights. llama.cpp rounds the blocks' activations to
8 bits in all of these; int4a8 and int8+int4 do so around them too, with weights in 4 or 8 bits."""


def choose_precision(parent: Artifact, precision: str | None) -> str:
    """The precision asked for, or the default. Raises UserError for what llama.cpp does not run."""
    manifest = parent.manifest
    check_policy(manifest)
    choices = CHOICES["gguf"][manifest.quantization.grid if manifest.quantization else "float"]
    if precision is None:
        precision = "fp32" if manifest.dtype == "float32" else choices[0]
    if precision not in choices:
        what = "quantize the policy first" if precision == "int4" else "choose one of those"
        raise UserError(
            f"expected a precision of {', '.join(choices)} for weights in {manifest.dtype}, found {precision}; {what}"
        )
    if manifest.quantization is None:
        gguf_file.check_rows(manifest.towers["decoder"], precision)
    llama_model.library()  # raises if llama.cpp is missing: the graphs are verified with it
    return precision


def choose_around(manifest: Manifest, precision: str) -> str:
    """The ONNX precision of the graphs around the blocks; float weights are not rounded to 8 bits there."""
    if manifest.quantization is not None:
        return AROUND[precision]
    return "fp32" if precision == "fp32" else "fp16"


def check_policy(manifest: Manifest) -> None:
    family = manifest.policy.family
    if family not in FAMILIES:
        raise UserError(
            f"expected a family of {', '.join(FAMILIES)} for gguf, found {family}, which has {OTHERS.get(family)}; "
            "export it --to onnx"
        )
    gguf_file.choose_architecture(manifest.towers["decoder"])


def write_graphs(
    draft: Draft, parent: Artifact, precision: str, weights: Weights | None = None
) -> tuple[GraphSpec, ...]:
    """``weights``: used instead of the parent's."""
    manifest, folder = parent.manifest, FOLDERS["gguf"]
    weights = read_weights(parent) if weights is None else weights
    specs, around = dict[str, GraphSpec](), choose_around(manifest, precision)
    blocks = precision if manifest.quantization is None else manifest.quantization.grid
    for name, define in FAMILIES[manifest.policy.family].items():
        builder = OnnxRuntimeBuilder(weights, FORMATS[around], Scratch(draft.path).empty)
        file = f"{folder}/{name}.onnx"
        define(builder, manifest.policy, manifest.towers)
        builder.write(name, draft.file(file))
        specs[name] = GraphSpec(name, "gguf", file, around, tuple(builder.inputs), tuple(builder.outputs), NEEDS)
    file = f"{folder}/decoder.gguf"
    write_blocks(draft.file(file), weights, manifest.towers["decoder"], blocks)
    inputs, outputs = fix_batch(specs["embed"].inputs), fix_batch(specs["head"].outputs)
    return *specs.values(), GraphSpec("decoder", "gguf", file, blocks, inputs, outputs, llama_model.NEEDS)


def fix_batch(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The tensors with a batch size of one."""
    return tuple(TensorSpec(tensor.name, tensor.dtype, (1, *tensor.shape[1:])) for tensor in tensors)


def write_blocks(path: Path, weights: Weights, tower: TowerSpec, precision: str) -> None:
    """Write the blocks; llama.cpp makes K-quants from a file in float16."""
    if precision != "q4_k_m":
        gguf_file.write(path, weights, tower, precision)
        return
    wide = path.with_suffix(".fp16")
    try:
        gguf_file.write(wide, weights, tower, "fp16")
        llama_model.quantize(wide, path, gguf_file.FILE_TYPES[precision])
    finally:
        wide.unlink(missing_ok=True)
