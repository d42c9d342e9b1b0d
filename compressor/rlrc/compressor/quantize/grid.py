"""The one grid of all backends: symmetric integers of 4 or 8 bits, groups of inputs, an fp16 scale for each group.

With groups of 32 those integers ARE GGUF's Q4_0 and Q8_0, ONNX Runtime's MatMulNBits and TensorRT's blocked INT4
DequantizeLinear: chosen once, exported bit-identically. Groups of 64 and 128 are what TensorRT documents and what CPUs
read faster; GGUF repeats their scales. How integers are chosen: rlrc.compressor.quantize.quantize.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlrc.artifact import QuantizationSpec

GROUPS = (32, 64, 128)
GROUP = GROUPS[0]  # the smallest, and the usual one: widths are multiples of it, where they are to be on the grid
LEVELS = {4: (-8, 7), 8: (-127, 127)}


def fit_group(inputs: int, most: int) -> int:
    """The group of a tensor that reads so many inputs, a multiple of 32: the largest up to ``most`` that divides it."""
    while inputs % most:
        most //= 2
    return most


def quantize_groups(weight: Tensor, bits: int, search: bool, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Round-to-nearest of weight (out, in) -> integers int8 (out, in), scale fp16 (out, in / group).

    ``group``: the most inputs that share a scale (see ``fit_group``).

    A group's scale maps its value of largest magnitude to the end of the grid, -8 for 4 bits (as Q4_0 does: the grid
    has one more negative level, so the sign of the scale follows that value). With ``search`` scales from 0.7 to 1.1 of
    that are tried.
    """
    low, high = LEVELS[bits]
    groups = weight.detach().float().unflatten(1, (-1, fit_group(weight.shape[1], group)))
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)
    candidates = [i / 40 for i in range(28, 45)] if search else [1.0]
    best_error = torch.full_like(extreme, float("inf"))
    best_scale = torch.zeros_like(extreme)
    for factor in candidates:
        scale = (factor * extreme / low).half().float()
        error = (dequantized(groups, scale, low, high) - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    integers = round_to_grid(groups, best_scale, low, high)
    return integers.flatten(1).to(torch.int8), best_scale[..., 0].half()


def round_to_grid(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return (groups * inverse).round().clamp(low, high)


def dequantized(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return round_to_grid(groups, scale, low, high) * scale


def dequantize_groups(integers: Tensor, scale: Tensor) -> Tensor:
    """Integers (out, in) and scale (out, groups) -> the float32 weight (out, in) that they stand for."""
    groups = integers.float().unflatten(1, (scale.shape[1], -1))
    return (groups * scale.float()[..., None]).flatten(1)


def pack(integers: Tensor) -> Tensor:
    """int8 (out, in) in [-8, 7] -> uint8 (out, in / 2), offset 8: byte j holds element 2j low and 2j + 1 high."""
    nibbles = (integers + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of ``pack``."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return nibbles.to(torch.int8) - 8


def count_bytes(numbers: int, bits: int, group: int = GROUP) -> int:
    """Of so many weights on the grid, scales included."""
    return numbers * bits // 8 + numbers // group * 2


def dequantize(tensors: Mapping[str, Tensor], spec: QuantizationSpec | None) -> dict[str, Tensor]:
    """Packed tensors -> float32 state dict; without a quantization the tensors are returned as they are."""
    if spec is None:
        return dict(tensors)
    result = {
        name: t.float()
        for name, t in tensors.items()
        if name.removesuffix(".q").removesuffix(".scale") not in spec.tensors
    }
    for name, bits in spec.tensors.items():
        packed = tensors[f"{name}.q"]
        result[name] = dequantize_groups(unpack(packed) if bits == 4 else packed, tensors[f"{name}.scale"])
    return result
