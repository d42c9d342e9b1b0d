"""The quantization grid: symmetric integers of 4 or 8 bits, groups of inputs, and one fp16 scale for each group.

All backends share it. With groups of 32 the integers are those of GGUF's Q4_0 and Q8_0, ONNX Runtime's MatMulNBits and
TensorRT's blocked INT4 DequantizeLinear, so every export is bit-identical. Groups of 64 and 128 are what TensorRT
documents, and CPUs read them faster; the GGUF export repeats their scales.

A QuantizationSpec says which tensors of a state dict are quantized, and to how many bits; ``compress`` and
``decompress`` convert the state dict. How the integers are chosen: rlrc.compressor.quantize.quantize.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from rlrc.artifact import QuantizationSpec
from rlrc.compressor.models.nn.linear import list_parts
from rlrc.compressor.models.storage.tensors import Tensors, rows_of

GROUPS = (32, 64, 128)
GROUP = GROUPS[0]  # the smallest, and the default: a weight on the grid has a multiple of it as inputs
LEVELS = {4: (-8, 7), 8: (-127, 127)}

Rounded = tuple[Tensor, Tensor]  # integers int8 (out, in), scale fp16 (out, groups)


def fit_group(inputs: int, most: int) -> int:
    """The largest group size up to ``most`` that divides ``inputs`` (a multiple of 32)."""
    while inputs % most:
        most //= 2
    return most


def quantize_groups(weight: Tensor, bits: int, search: bool, group: int = GROUP) -> Rounded:
    """Round weight (out, in) to the nearest levels. ``group``: most inputs that share a scale (see ``fit_group``).

    A group's scale maps its value of largest magnitude to the lowest level, -8 for 4 bits. As in Q4_0, the scale takes
    the sign that makes that value negative, since the grid has one negative level more. With ``search``, scales from
    0.7 to 1.1 times that one are tried, and the one with the smallest squared error is used.
    """
    columns = weight.shape[1]
    integers = weight.new_empty(weight.shape, dtype=torch.int8)
    scale = weight.new_empty(len(weight), columns // (size := fit_group(columns, group)), dtype=torch.float16)
    for rows in list_parts(weight.shape):
        integers[rows], scale[rows] = _round_rows(weight.detach()[rows], bits, search, size)
    return integers, scale


def _round_rows(weight: Tensor, bits: int, search: bool, group: int) -> Rounded:
    low, high = LEVELS[bits]
    groups = weight.float().unflatten(1, (-1, group))
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)
    candidates = [i / 40 for i in range(28, 45)] if search else [1.0]
    best_error = torch.full_like(extreme, float("inf"))
    best_scale = torch.zeros_like(extreme)
    for factor in candidates:
        scale = (factor * extreme / low).half().float()
        error = (round_to_grid(groups, scale, low, high) * scale - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    integers = round_to_grid(groups, best_scale, low, high)
    return integers.flatten(1).to(torch.int8), best_scale[..., 0].half()


def round_to_grid(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return (groups * inverse).round().clamp(low, high)


def dequantize_groups(integers: Tensor, scale: Tensor) -> Tensor:
    """Integers (out, in) and scale (out, groups) -> float32 weight (out, in)."""
    values = integers.float()
    values.unflatten(1, (scale.shape[1], -1)).mul_(scale.float()[..., None])
    return values


def pack(integers: Tensor) -> Tensor:
    """int8 (out, in) in [-8, 7] -> uint8 (out, in / 2), offset 8: byte j has element 2j low and 2j + 1 high."""
    nibbles = (integers + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of ``pack``."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return nibbles.to(torch.int8) - 8


def count_bytes(numbers: int, bits: int, group: int = GROUP) -> int:
    """Bytes of this many weights on the grid, scales included."""
    return numbers * bits // 8 + numbers // group * 2


def compress(tensors: Tensors, packed: Mapping[str, Rounded], spec: QuantizationSpec) -> Tensors:
    """A float state dict -> as stored: ``NAME.q`` and ``NAME.scale`` of the spec's tensors, others in fp16.

    ``packed``: integers as stored (see ``pack``), and scales.
    """
    stored = {f"{name}.{part}": packed[name][i] for name in spec.tensors for i, part in enumerate(("q", "scale"))}
    floats = {name: torch.empty(tensors.shape(name), dtype=torch.float16, device="meta") for name in tensors}
    floats = {name: meta for name, meta in floats.items() if name not in spec.tensors}

    def narrow(name: str, rows: slice | Tensor) -> Tensor:
        return rows_of(tensors, name)(rows).half()

    def read(name: str) -> Tensor:
        return tensors[name].half() if name in floats else stored[name]

    computed = {name: partial(narrow, name) for name, meta in floats.items() if meta.ndim == 2}
    metas = floats | {name: tensor.to("meta") for name, tensor in stored.items()}
    return Tensors("the quantized weights", metas, read, computed=computed)


def decompress(tensors: Mapping[str, Tensor], spec: QuantizationSpec | None) -> Mapping[str, Tensor]:
    """Inverse of ``compress``: a float state dict, its quantized tensors computed in float32 when they are read.

    Without a spec the tensors are returned unchanged.
    """
    if spec is None:
        return tensors
    given = tensors if isinstance(tensors, Tensors) else Tensors("the quantized weights", dict(tensors))
    parts = {f"{name}.{part}" for name in spec.tensors for part in ("q", "scale")}
    metas = {name: given.meta(name) for name in given if name not in parts}
    for name, bits in spec.tensors.items():
        rows, columns = given.shape(f"{name}.q")
        metas[name] = torch.empty(rows, columns * 8 // bits, device="meta")

    def compute(name: str, rows: slice | Tensor) -> Tensor:
        packed, scale = given[f"{name}.q"][rows], given[f"{name}.scale"][rows]
        return dequantize_groups(unpack(packed) if spec.tensors[name] == 4 else packed, scale)

    computed = {name: rows for name, rows in given.computed.items() if name in metas}
    computed |= {name: partial(compute, name) for name in spec.tensors}
    return Tensors(given.origin, metas, given.__getitem__, computed=computed)
