"""Write a decoder's blocks as a model file of llama.cpp, one tensor in memory at a time.

The file has the blocks and the final norm: vectors go in, hidden states come out. Embeddings, pictures and heads are
computed elsewhere. llama.cpp requires a vocabulary; it gets a single token of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import gguf  # the library, not this package
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.quantize.grid import GROUP
from rlrc.errors import UserError
from rlrc.exporters.gguf.blocks import pack_blocks
from rlrc.exporters.graphs.weights import Weights, to_float16, unpack_nibbles

CONTEXT = 4096  # longest sequence of the training according to the file; llama.cpp only warns beyond it
EMPTY = 32  # channels of zeros for a block without an MLP: llama.cpp would skip its attention too
K_BLOCK = 256
FILE_TYPES = {"fp32": 0, "fp16": 1, "int4": 2, "int8": 7, "q4_k_m": 15}  # llama_ftype


def choose_architecture(tower: TowerSpec) -> str:
    """llama.cpp's name for such blocks. Raises UserError for blocks that it does not compute."""
    kinds = sorted({layer.kind for layer in tower.layers} - {"self"})
    found = [f"{tower.norm} norms"] * (tower.norm != "rms") + [f"{kind} blocks" for kind in kinds]
    found += [f"the activation {tower.activation}"] * (tower.activation not in (None, "silu"))
    if found:
        raise UserError(
            "expected a decoder of self-attention blocks with plain RMS norms and SiLU, the only kind that llama.cpp "
            f"computes at any geometry, found {', '.join(found)}; export it --to onnx"
        )
    first = tower.layers[0]
    same = all(layer == first for layer in tower.layers) and first.heads and first.mlp
    return "llama" if same else "deci"


def check_rows(tower: TowerSpec, precision: str) -> None:
    """Raises UserError unless every row consists of whole blocks of the precision."""
    block = {"q4_k_m": K_BLOCK, "int8": 32}.get(precision, 1)
    widths = {"width": {tower.width}, "heads * head_dim": set[int](), "mlp": set[int]()}
    for layer in tower.layers:
        widths["heads * head_dim"].add(layer.heads * layer.head_dim)
        widths["mlp"].add(layer.mlp)
    for what, sizes in widths.items():
        if odd := sorted(size for size in sizes if size % block):
            raise UserError(
                f"expected multiples of {block} for {precision}, found {what} {', '.join(map(str, odd))} in the "
                f"decoder; use --precision fp16, or prune with align {block}"
            )


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: llama.cpp's name, shape and type, and a function that reads its data."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], NDArray[Any]]

    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size


def write(path: Path, weights: Weights, tower: TowerSpec, precision: str) -> None:
    """Write the file. ``precision``: fp32, fp16, int8 or int4; quantized tensors keep their integers."""
    writer = gguf.GGUFWriter(path, choose_architecture(tower))
    write_metadata(writer, tower, precision)
    listed = list(list_entries(weights, tower, precision))
    for entry in listed:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes(), entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in listed:
            writer.write_tensor_data(np.ascontiguousarray(entry.read()))
    finally:
        writer.close()


def write_metadata(writer: gguf.GGUFWriter, tower: TowerSpec, precision: str) -> None:
    layers, first = list(tower.layers), tower.layers[0]
    same = choose_architecture(tower) == "llama"
    if not first.heads:
        layers[0] = replace(first, heads=1, kv_heads=1)

    def each(value: Callable[[LayerSpec], int]) -> Any:
        return value(first) if same else [value(layer) for layer in layers]

    writer.add_block_count(len(layers))
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(tower.width)
    writer.add_head_count(each(lambda layer: layer.heads))
    writer.add_head_count_kv(each(lambda layer: layer.kv_heads))
    writer.add_feed_forward_length(each(lambda layer: layer.mlp or EMPTY))
    writer.add_key_length(first.head_dim)
    writer.add_value_length(first.head_dim)
    writer.add_rope_dimension_count(first.head_dim)
    writer.add_rope_freq_base(tower.theta)
    writer.add_layer_norm_rms_eps(tower.eps)
    writer.add_vocab_size(1)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def list_entries(weights: Weights, tower: TowerSpec, precision: str) -> Iterator[Entry]:
    """The file's tensors, in file order."""

    def norm(name: str, tensor: str) -> Entry:
        return Entry(name, (tower.width,), Kind.F32, lambda: weights.array(tensor) + np.float32(tower.norm_offset))

    def product(name: str, tensor: str, order: NDArray[np.intp] | None = None) -> Entry:
        kind = choose_type(weights, tensor, precision)
        return Entry(name, weights.shape(tensor), kind, lambda: read_data(weights, tensor, kind, order))

    def zeros(name: str, *shape: int) -> Entry:
        return Entry(name, shape, Kind.F32, lambda: np.zeros(shape, np.float32))

    yield zeros("token_embd.weight", 1, tower.width)
    for i, layer in enumerate(tower.layers):
        block, prefix = f"decoder.layers.{i}", f"blk.{i}"
        if layer.heads:
            yield norm(f"{prefix}.attn_norm.weight", f"{block}.norm1.weight")
            for part, heads in (("q", layer.heads), ("k", layer.kv_heads)):
                order = interleave_pairs(heads, layer.head_dim)
                yield product(f"{prefix}.attn_{part}.weight", f"{block}.attention.{part}.weight", order)
            yield product(f"{prefix}.attn_v.weight", f"{block}.attention.v.weight")
            yield product(f"{prefix}.attn_output.weight", f"{block}.attention.o.weight")
        elif i == 0:  # llama.cpp reads the head size of all blocks from the first one: give it a head of zeros
            yield zeros(f"{prefix}.attn_norm.weight", tower.width)
            for part in "qkv":
                yield zeros(f"{prefix}.attn_{part}.weight", layer.head_dim, tower.width)
            yield zeros(f"{prefix}.attn_output.weight", tower.width, layer.head_dim)
        yield norm(f"{prefix}.ffn_norm.weight", f"{block}.norm2.weight")
        for part in ("gate", "up", "down"):
            name = f"{prefix}.ffn_{part}.weight"
            if layer.mlp:
                yield product(name, f"{block}.mlp.{part}.weight")
            else:
                yield zeros(name, *((tower.width, EMPTY) if part == "down" else (EMPTY, tower.width)))
    yield norm("output_norm.weight", "decoder.norm.weight")


def interleave_pairs(heads: int, head_dim: int) -> NDArray[np.intp]:
    """The order of query and key channels in which the two channels of a rotated pair are adjacent, as in llama.cpp."""
    order: NDArray[np.intp] = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    return order


def choose_type(weights: Weights, name: str, precision: str) -> Kind:
    if bits := weights.bits(name):
        return Kind.Q4_0 if bits == 4 else Kind.Q8_0
    if precision == "fp32" or name in weights.exact:
        return Kind.F32
    return Kind.Q8_0 if precision == "int8" and weights.quantization is None else Kind.F16


def read_data(weights: Weights, name: str, kind: Kind, order: NDArray[np.intp] | None) -> NDArray[Any]:
    """The tensor in this type, its rows in this order; a quantized tensor keeps its integers."""
    rows: Any = slice(None) if order is None else order
    if bits := weights.bits(name):
        integers, scales = weights.read_packed([name])
        # llama.cpp has groups of 32; larger groups repeat their scale.
        scales = np.repeat(scales, weights.shape(name)[1] // scales.shape[1] // GROUP, axis=1)
        signed = unpack_nibbles(integers).astype(np.int8) - np.int8(8) if bits == 4 else integers
        return pack_blocks(signed[rows], scales[rows], bits)
    values: NDArray[Any] = weights.array(name)[rows]
    if kind == Kind.Q8_0:
        blocks: NDArray[Any] = gguf.quants.quantize(values, kind)
        return blocks
    if kind == Kind.F32:
        return values
    return to_float16(name, values, "fp32")
