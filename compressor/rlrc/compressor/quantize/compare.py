"""Compares the errors of the rounding methods on one policy: 4 bits by three methods, NF4 (never stored), 8 bits.

Weight error: Frobenius norm of the change of all rounded weights, relative to that of the weights. Output error: the
same for the layers' outputs on calibration inputs, averaged over layers. Action error: see
rlrc.compressor.quantize.action_error. AWQ's weights and outputs are those of its scaled policy, which computes the same
actions. All methods round the same tensors.

Every second observation is used for calibration and the others for measuring, since GPTQ fits its calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.storage.scratch import Allocate, keep
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.quantize.action_error import ActionError, fix_noise, swap_tensors
from rlrc.compressor.quantize.awq import scale_channels
from rlrc.compressor.quantize.calibration import collect_inputs
from rlrc.compressor.quantize.gptq import Feedback, gptq
from rlrc.compressor.quantize.grid import count_bytes, dequantize_groups, quantize_groups
from rlrc.compressor.quantize.nf4 import BITS, round_to_nf4
from rlrc.compressor.quantize.quantize import QuantizeConfig, check_float16, choose_bits, overlay

GRIDS = ("rtn", "awq", "gptq", "nf4", "int8")  # in the order of the rows

Round = Callable[[str, Tensor], Tensor]  # name, weight -> the rounded weight in float32


@dataclass(frozen=True)
class RoundingRow:
    grid: str
    weight_error: float
    output_error: float
    action_error: float
    bytes: int
    """size of the rounded tensors"""


def compare(
    policy: PolicyModule, calibration: Iterable[Inputs], search: bool = True, allocate: Allocate | None = None
) -> Iterator[RoundingRow]:
    """Yield one row per method, as it is measured. ``allocate`` makes room for rounded weights and samples of inputs.

    Raises UserError for NaN in the weights or observations.
    """
    stored = {name: check_float16(name, tensor.detach()) for name, tensor in policy.state_dict().items()}
    tensors = Tensors("the policy", stored)
    bits, everything = choose_bits(tensors, QuantizeConfig()), list(calibration)
    seen, error = everything[::2], ActionError(policy, everything[1::2] or everything)
    inputs, unseen = (collect_inputs(policy, some, bits, allocate) for some in (fix_noise(policy, seen), error.inputs))

    def round_nearest(name: str, weight: Tensor, width: int) -> Tensor:
        return dequantize_groups(*quantize_groups(weight, width, search))

    feedback = Feedback()

    def round_gptq(name: str, weight: Tensor) -> Tensor:
        if name not in inputs:
            return round_nearest(name, weight, 4)
        return dequantize_groups(*gptq(weight, feedback.of(inputs[name], weight.device), 4, search))

    def measure(grid: str, base: Tensors, given: Mapping[str, Tensor], rounding: Round, size: float) -> RoundingRow:
        rounded, outputs, changes, weights = dict[str, Tensor](), list[float](), list[Tensor](), list[Tensor]()
        for name in bits:
            weight = base[name].float()
            found = rounding(name, weight)
            rounded[name], change = keep(found, allocate), found - weight
            if name in given:
                rows = given[name].to(weight.device)
                outputs.append(norm_ratio(rows @ change.T, rows @ weight.T))
            changes.append(change.norm())
            weights.append(weight.norm())
        return RoundingRow(
            grid,
            norm_ratio(torch.stack(changes), torch.stack(weights)),
            sum(outputs) / max(len(outputs), 1),
            error.measure(overlay(base, rounded, rounded)),
            round(size),
        )

    numbers = sum(tensors.meta(name).numel() for name in bits)
    yield measure("rtn", tensors, unseen, partial(round_nearest, width=4), count_bytes(numbers, 4))
    equal, _ = scale_channels(policy, tensors, bits, inputs, search)
    with swap_tensors(policy, equal):
        given = collect_inputs(policy, error.inputs, bits, allocate)
    yield measure("awq", equal, given, partial(round_nearest, width=4), count_bytes(numbers, 4))
    yield measure("gptq", tensors, unseen, round_gptq, count_bytes(numbers, 4))
    yield measure("nf4", tensors, unseen, lambda name, weight: round_to_nf4(weight), numbers * BITS / 8)
    yield measure("int8", tensors, unseen, partial(round_nearest, width=8), count_bytes(numbers, 8))


def norm_ratio(change: Tensor, base: Tensor) -> float:
    """Norm of the change relative to that of the base; 0 for an empty base."""
    return float(change.norm() / base.norm().clamp(min=torch.finfo().tiny))
