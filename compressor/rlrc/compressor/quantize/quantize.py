"""Quantization: which tensors get 4 bits and which 8, and how their integers on the one grid are chosen (see grid.py).

Linear layers whose inputs fill whole groups are quantized, the action head among them unless the configuration says
otherwise. Norms, biases and positions stay fp16: they are small. So do embeddings, unless they are given 8 bits: they
are looked up, not multiplied, and in 4 bits most of a word would be gone for good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlrc.artifact import QuantizationSpec
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.tensors import largest_magnitude
from rlrc.compressor.quantize.action_error import ActionError
from rlrc.compressor.quantize.awq import scale_channels
from rlrc.compressor.quantize.calibration import collect_inputs
from rlrc.compressor.quantize.gptq import gptq
from rlrc.compressor.quantize.grid import (
    GROUP,
    GROUPS,
    count_bytes,
    dequantize,
    dequantize_groups,
    fit_group,
    pack,
    quantize_groups,
)
from rlrc.errors import UserError

METHODS = ("rtn", "awq", "gptq")
EMBEDDING = "embedding.weight"
HEADS = ("head.", "action_out.")  # the layers that make the actions (or their logits), by family

Rounded = tuple[Tensor, Tensor]  # integers int8 (out, in), scale fp16 (out, groups)


@dataclass(frozen=True)
class QuantizeConfig:
    exempt: tuple[str, ...] = ()
    """tensors that stay in 8 bits because 4 cost too much (names as in the state dict)"""
    search: bool = True
    """choose each group's scale by the smallest squared error instead of the largest value alone"""
    bits: Literal[4, 8] = 4
    """of every linear layer whose inputs fill whole groups of 32"""
    method: Literal["rtn", "awq", "gptq"] = "rtn"
    """how integers are chosen: round to nearest; after scaling input channels (AWQ); with error feedback (GPTQ)"""
    budget: float = 0.0
    """part of the 4-bit bytes that may be spent on keeping in 8 bits the tensors whose rounding changes the actions
    most, by measurement (one pass over the calibration observations for each tensor)"""
    head: Literal[4, 8, 16] | None = None
    """bits of the layers that make the actions; 16 leaves them unquantized (default: those of the others)"""
    embeddings: Literal[8, 16] = 16
    """bits of the word embeddings"""
    group: Literal[32, 64, 128] = 32
    """most inputs that share a scale: 32 loses least, TensorRT documents 64 and 128 for 4 bits (prune with align of the
    same number, or narrow layers get smaller ones)"""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"expected quantize.method {', '.join(METHODS)}, found {self.method!r}")
        known_choices = {"bits": (4, 8), "head": (None, 4, 8, 16), "embeddings": (8, 16), "group": GROUPS}
        for name, choices in known_choices.items():
            if (found := getattr(self, name)) not in choices:
                known = ", ".join(str(choice) for choice in choices if choice)
                raise UserError(f"expected quantize.{name} {known}, found {found!r}")
        if not 0 <= self.budget <= 1:
            raise UserError(f"expected quantize.budget from 0 to 1, a part of the 4-bit bytes, found {self.budget}")
        if self.budget and self.bits == 8:
            raise UserError(f"expected quantize.budget 0 with 8 bits, which need no exceptions, found {self.budget}")

    @property
    def needs_calibration(self) -> bool:
        return self.method != "rtn" or self.budget > 0


class QuantizedWeights(NamedTuple):
    """``tensors`` as stored: ``NAME.q`` and ``NAME.scale``; others fp16. ``report`` is what the history tells."""

    tensors: dict[str, Tensor]
    spec: QuantizationSpec
    report: dict[str, Any]


def quantize(
    policy: PolicyModule | Mapping[str, Tensor], config: QuantizeConfig, calibration: Iterable[Inputs] = ()
) -> QuantizedWeights:
    """A float policy, or its state dict if nothing is to be calibrated, on the grid. The policy is left as it is.

    ``calibration``: a few dozen observations, preprocessed; they stay in memory. With them the report has the action
    error (see rlrc.compressor.quantize.action_error) of the result. Raises UserError for NaN, infinity and what float16
    cannot hold in the weights, for NaN in the observations, and if a method needs observations and there are none.
    """
    state = policy.state_dict() if isinstance(policy, PolicyModule) else policy
    tensors = {name: check_float16(name, tensor.detach()) for name, tensor in state.items()}
    check_exempt(tensors, config)
    bits = choose_bits(tensors, config)
    report: dict[str, Any] = {}
    error, given = None, list(calibration)
    if isinstance(policy, PolicyModule) and given:
        error = ActionError(policy, given)
    elif config.needs_calibration:
        raise UserError(
            f"expected a policy and calibration observations for quantize.method {config.method} with budget "
            f"{config.budget}, found none; give both"
        )
    inputs: dict[str, Tensor] = {}
    if config.method != "rtn" and error is not None:
        inputs = collect_inputs(error.policy, error.inputs, bits)
        report["unobserved"] = [name for name in bits if name not in inputs and name != EMBEDDING]
    if config.method == "awq" and error is not None:
        tensors, alphas = scale_channels(error.policy, tensors, bits, inputs, config.search, config.group)
        report["alphas"] = alphas

    def rounded(name: str, width: int) -> Rounded:
        if config.method == "gptq" and name in inputs:
            return gptq(tensors[name], inputs[name], width, config.search, config.group)
        return quantize_groups(tensors[name], width, config.search, config.group)

    result = {name: rounded(name, width) for name, width in bits.items()}
    if config.budget and error is not None:
        without = {**tensors, **{name: dequantize_groups(*pair) for name, pair in result.items()}}
        report["action_error_without_exceptions"] = error.measure(without)
        report["exceptions"] = choose_exceptions(error, tensors, result, bits, config)
        for exception in report["exceptions"]:
            bits[exception["tensor"]] = 8
            result[exception["tensor"]] = rounded(exception["tensor"], 8)
    packed = stored(tensors, result, bits)
    spec = QuantizationSpec(majority_grid(bits, tensors), config.group, bits)
    if error is not None:
        report["action_error"] = error.measure(dequantize(packed, spec))
    report["bytes"] = sum(tensor.nbytes for tensor in packed.values())
    return QuantizedWeights(packed, spec, report)


def format_report(report: Mapping[str, Any]) -> list[str]:
    """What ``quantize`` reports, for people."""
    found = []
    if "exceptions" in report:
        before, names = report["action_error_without_exceptions"], [one["tensor"] for one in report["exceptions"]]
        found.append(f"kept in 8 bits (action error {before:.3g} without): {', '.join(names) or 'none'}")
    if "action_error" in report:
        error = report["action_error"]
        found.append(f"mean action error {error:.3g}, in normalised units, on the observations given for calibration")
    return found


def quantizable(name: str, tensor: Tensor) -> bool:
    """Weights of linear layers whose inputs fill whole groups; embeddings, norms, positions and biases are not."""
    return (
        tensor.ndim == 2
        and tensor.numel() > 0
        and tensor.shape[1] % GROUP == 0
        and name.endswith(".weight")
        and not name.startswith("embedding")
    )


def choose_bits(tensors: Mapping[str, Tensor], config: QuantizeConfig) -> dict[str, int]:
    """Bits of every tensor that is quantized, before exceptions."""
    bits: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name == EMBEDDING and config.embeddings == 8 and tensor.shape[1] % GROUP == 0:
            bits[name] = 8
        elif quantizable(name, tensor):
            width = config.head if config.head and name.startswith(HEADS) else config.bits
            width = 8 if name in config.exempt else width
            if width != 16:
                bits[name] = width
    return bits


def check_exempt(tensors: Mapping[str, Tensor], config: QuantizeConfig) -> None:
    """Raises UserError if an exemption names a tensor that is not there or is not quantized anyway."""
    for name in config.exempt:
        if name not in tensors or not quantizable(name, tensors[name]):
            choices = ", ".join(other for other, tensor in tensors.items() if quantizable(other, tensor))
            raise UserError(f"expected quantize.exempt to name quantizable tensors ({choices}), found {name!r}")


def check_float16(name: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises UserError for what the grid's float16 scales and the tensors stored in float16 cannot hold."""
    found = largest_magnitude(tensor)
    if not isfinite(found):
        raise UserError(f"expected finite weights, found NaN or infinity in {name}; repair the checkpoint")
    if found > torch.finfo(torch.float16).max:
        raise UserError(f"expected {name} within float16's range, found {found:.3g}; repair the checkpoint")
    return tensor


def majority_grid(bits: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Literal["int4", "int8"]:
    """What most of the quantized weights are in."""
    numbers = {4: 0, 8: 0}
    for name, width in bits.items():
        numbers[width] += tensors[name].numel()
    return "int4" if numbers[4] >= numbers[8] else "int8"


def choose_exceptions(
    error: ActionError,
    tensors: Mapping[str, Tensor],
    rounded: Mapping[str, Rounded],
    bits: Mapping[str, int],
    config: QuantizeConfig,
) -> list[dict[str, Any]]:
    """The 4-bit tensors to keep in 8 bits: by action error a byte, the largest first, until the budget is spent.

    The error of a tensor is that of the policy in which it alone is rounded; ``tensors`` are that policy's. Each comes
    with its error and the bytes that it costs more.
    """
    four = [name for name, width in bits.items() if width == 4]

    def size(name: str, width: int) -> int:
        return count_bytes(tensors[name].numel(), width, fit_group(tensors[name].shape[1], config.group))

    left = config.budget * sum(size(name, 4) for name in four)
    found = list[dict[str, Any]]()
    for name in four:
        alone = error.measure({**tensors, name: dequantize_groups(*rounded[name])})
        found.append({"tensor": name, "action_error": alone, "bytes": size(name, 8) - size(name, 4)})
    chosen = list[dict[str, Any]]()
    for one in sorted(found, key=lambda one: one["action_error"] / one["bytes"], reverse=True):
        if one["bytes"] <= left:
            chosen.append(one)
            left -= one["bytes"]
    return chosen


def stored(tensors: Mapping[str, Tensor], rounded: Mapping[str, Rounded], bits: Mapping[str, int]) -> dict[str, Tensor]:
    """Packed integers and scales of the rounded ones, others in fp16."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in rounded:
            integers, packed[f"{name}.scale"] = rounded[name]
            packed[f"{name}.q"] = pack(integers) if bits[name] == 4 else integers
        else:
            packed[name] = tensor.half()
    return packed
