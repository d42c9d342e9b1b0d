"""Four-bit quantization on the one grid of all backends: symmetric int4, groups of 32 inputs, fp16 scale.

Those integers are GGUF's Q4_0, ONNX Runtime's MatMulNBits (block 32) and TensorRT's blocked INT4 DequantizeLinear:
chosen once here, exported bit-identically.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlrc.artifact import QuantizationSpec
from rlrc.errors import UserError

GROUP = 32
LEVELS = {4: (-8, 7), 8: (-127, 127)}


@dataclass(frozen=True)
class QuantizeConfig:
    exempt: tuple[str, ...] = ()
    """tensors that stay in 8 bits because 4 cost too much (names as in the state dict)"""
    search: bool = True
    """choose each group's scale by the smallest squared error instead of the largest value alone"""


def quantize_groups(weight: Tensor, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """Round-to-nearest of weight (out, in) -> integers int8 (out, in), scale fp16 (out, in / 32).

    A group's scale maps its value of largest magnitude to the end of the grid, -8 for 4 bits (as Q4_0 does: the grid
    has one more negative level, so the sign of the scale follows that value). With ``search`` scales from 0.7 to 1.1 of
    that are tried.
    """
    low, high = LEVELS[bits]
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
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
    integers = integers_of(groups, best_scale, low, high)
    return integers.flatten(1).to(torch.int8), best_scale[..., 0].half()


def integers_of(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return (groups * inverse).round().clamp(low, high)


def dequantized(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return integers_of(groups, scale, low, high) * scale


def pack(integers: Tensor) -> Tensor:
    """int8 (out, in) in [-8, 7] -> uint8 (out, in / 2), offset 8: byte j holds element 2j low and 2j + 1 high."""
    nibbles = (integers + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of ``pack``."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return nibbles.to(torch.int8) - 8


def quantizable(name: str, tensor: Tensor) -> bool:
    """Weights of linear layers whose inputs fill whole groups; embeddings, norms, positions and biases are not."""
    return (
        tensor.ndim == 2
        and tensor.shape[1] % GROUP == 0
        and name.endswith(".weight")
        and not name.startswith("embedding")
    )


def check_exempt(tensors: dict[str, Tensor], config: QuantizeConfig) -> None:
    """Raises UserError if an exemption names a tensor that is not there or is not quantized anyway."""
    for name in config.exempt:
        if name not in tensors or not quantizable(name, tensors[name]):
            choices = ", ".join(other for other, tensor in tensors.items() if quantizable(other, tensor))
            raise UserError(f"expected quantize.exempt to name quantizable tensors ({choices}), found {name!r}")


def quantize(tensors: dict[str, Tensor], config: QuantizeConfig) -> tuple[dict[str, Tensor], QuantizationSpec]:
    """State dict -> packed tensors (``NAME.q``, ``NAME.scale``; others fp16) and what was done to which."""
    check_exempt(tensors, config)
    packed: dict[str, Tensor] = {}
    bits: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not quantizable(name, tensor):
            packed[name] = tensor.half()
            continue
        bits[name] = 8 if name in config.exempt else 4
        integers, scale = quantize_groups(tensor, bits[name], config.search)
        packed[f"{name}.q"] = pack(integers) if bits[name] == 4 else integers
        packed[f"{name}.scale"] = scale
    return packed, QuantizationSpec("int4", GROUP, bits)


def dequantize(tensors: dict[str, Tensor], spec: QuantizationSpec | None) -> dict[str, Tensor]:
    """Packed tensors -> float32 state dict; without a quantization the tensors are returned as they are."""
    if spec is None:
        return tensors
    result = {
        name: t.float()
        for name, t in tensors.items()
        if name.removesuffix(".q").removesuffix(".scale") not in spec.tensors
    }
    for name, bits in spec.tensors.items():
        packed, scale = tensors[f"{name}.q"], tensors[f"{name}.scale"].float()
        integers = (unpack(packed) if bits == 4 else packed).float()
        result[name] = (integers.unflatten(1, (-1, spec.group)) * scale[..., None]).flatten(1)
    return result
