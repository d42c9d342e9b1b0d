"""Post-training quantization: choose the bits of every tensor, then its integers on the grid (see grid.py).

Quantized are the weights of linear layers whose inputs fill whole groups, the action head included unless the
configuration excludes it. Norms, biases and positions are small and stay fp16. Embeddings stay fp16 as well, or take 8
bits: they are looked up, not multiplied, and 4 bits lose most of a word.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlrc.artifact import QuantizationSpec
from rlrc.compressor.models import heap
from rlrc.compressor.models.nn.linear import Rows, list_parts
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.storage.scratch import Allocate, keep
from rlrc.compressor.models.storage.tensors import Tensors, largest_magnitude, rows_of
from rlrc.compressor.quantize.action_error import ActionError
from rlrc.compressor.quantize.awq import scale_channels
from rlrc.compressor.quantize.calibration import collect_inputs
from rlrc.compressor.quantize.gptq import Feedback, gptq
from rlrc.compressor.quantize.grid import (
    GROUP,
    GROUPS,
    Rounded,
    compress,
    count_bytes,
    decompress,
    fit_group,
    pack,
    quantize_groups,
)
from rlrc.errors import UserError
from rlrc.ranges import check_range

METHODS = ("rtn", "awq", "gptq")
EMBEDDING = "embedding.weight"
HEADS = ("head.", "action_out.")  # the layers that make the actions (or their logits), by family


@dataclass(frozen=True)
class QuantizeConfig:
    exempt: tuple[str, ...] = ()
    """tensors that stay in 8 bits because 4 lose too much (names as in the state dict)"""
    search: bool = True
    """choose each group's scale by the smallest squared error instead of the largest value alone"""
    bits: Literal[4, 8] = 4
    """bits of every linear layer whose inputs fill whole groups of 32"""
    method: Literal["rtn", "awq", "gptq"] = "rtn"
    """how integers are chosen: rtn: round to nearest; awq: scale channels first; gptq: with error feedback"""
    budget: float = 0.0
    """part of the 4-bit bytes that may be added to keep in 8 bits the tensors whose rounding changes the actions most
    (measured: one pass over the calibration observations for each tensor)"""
    head: Literal[4, 8, 16] | None = None
    """bits of the layers that make the actions; 16 leaves them unquantized (default: as the other layers)"""
    embeddings: Literal[8, 16] = 16
    """bits of the word embeddings"""
    data: str = ""
    """LeRobotDataset folder with the observations for awq, gptq and budget; empty: the artifact's golden ones"""
    samples: int = 16
    """observations to take from the data set"""
    cameras: dict[str, str] = field(default_factory=dict)
    """camera of the policy = camera of the data set, where the names differ; none: do without it"""
    seed: int = 0
    """of the choice of observations"""
    group: Literal[32, 64, 128] = 32
    """most inputs that share a scale: 32 loses least, TensorRT documents 64 and 128 for 4 bits (prune with the same
    align, or narrow layers get smaller groups)"""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"expected quantize.method {', '.join(METHODS)}, found {self.method!r}")
        check_range(self, "quantize.", "samples", at_least=1)
        allowed = {"bits": (4, 8), "head": (None, 4, 8, 16), "embeddings": (8, 16), "group": GROUPS}
        for name, choices in allowed.items():
            if (found := getattr(self, name)) not in choices:
                expected = ", ".join(str(choice) for choice in choices if choice)
                raise UserError(f"expected quantize.{name} {expected}, found {found!r}")
        if not 0 <= self.budget <= 1:
            raise UserError(f"expected quantize.budget from 0 to 1, a part of the 4-bit bytes, found {self.budget}")
        if self.budget and self.bits == 8:
            raise UserError(f"expected quantize.budget 0 with 8 bits, which need no exceptions, found {self.budget}")

    @property
    def needs_calibration(self) -> bool:
        return self.method != "rtn" or self.budget > 0


class QuantizedWeights(NamedTuple):
    """``tensors`` as stored (see ``compress``), and the ``report`` for the artifact's history."""

    tensors: Tensors
    spec: QuantizationSpec
    report: dict[str, Any]


def quantize(
    policy: PolicyModule | Mapping[str, Tensor],
    config: QuantizeConfig,
    calibration: Iterable[Inputs] = (),
    allocate: Allocate | None = None,
) -> QuantizedWeights:
    """Quantize a float policy, or a state dict if the configuration needs no calibration. The policy is unchanged.

    ``calibration``: a few dozen preprocessed observations, kept in memory. With them the report has the result's action
    error (see rlrc.compressor.quantize.action_error). ``allocate`` makes room for integers, scales, and the samples of
    the layers' inputs. Raises UserError for weights that are not finite in float16, for observations that are not
    finite, and for a method or budget that needs observations and has none.
    """
    state = policy.state_dict() if isinstance(policy, PolicyModule) else policy
    tensors = Tensors("the policy", {name: check_float16(name, tensor.detach()) for name, tensor in state.items()})
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
        inputs = collect_inputs(error.policy, error.inputs, bits, allocate)
        report["unobserved"] = [name for name in bits if name not in inputs and name != EMBEDDING]
    if config.method == "awq" and error is not None:
        tensors, report["alphas"] = scale_channels(error.policy, tensors, bits, inputs, config.search, config.group)

    feedback = Feedback()

    def round_tensor(name: str, width: int) -> Rounded:
        if config.method == "gptq" and name in inputs:
            weight = tensors[name]
            factor = feedback.of(inputs[name], weight.device)
            integers, scale = gptq(weight, factor, width, config.search, config.group)
            return keep(pack(integers) if width == 4 else integers, allocate), keep(scale, allocate)
        return round_rows(rows_of(tensors, name), tensors.shape(name), width, config, allocate or torch.empty)

    def stored() -> tuple[Tensors, QuantizationSpec]:
        spec = QuantizationSpec(majority_grid(bits, tensors), config.group, dict(bits))
        return compress(tensors, packed, spec), spec

    packed = dict[str, Rounded]()
    for name, width in bits.items():
        packed[name] = round_tensor(name, width)
        heap.trim()
    if config.budget and error is not None:
        rounded = decompress(*stored())
        report["action_error_without_exceptions"] = error.measure(overlay(tensors, rounded, bits))
        report["exceptions"] = choose_exceptions(error, tensors, rounded, bits, config)
        for exception in report["exceptions"]:
            name = exception["tensor"]
            bits[name], packed[name] = 8, round_tensor(name, 8)
    result, spec = stored()
    if error is not None:
        report["action_error"] = error.measure(decompress(result, spec))
    report["bytes"] = sum(result.meta(name).nbytes for name in result)
    return QuantizedWeights(result, spec, report)


def round_rows(rows: Rows, shape: tuple[int, ...], width: int, config: QuantizeConfig, allocate: Allocate) -> Rounded:
    """Round a matrix of this shape to nearest, some rows at a time. -> integers as stored, scale."""
    columns, eight = shape[1], width == 8
    integers = allocate((shape[0], columns * width // 8), dtype=torch.int8 if eight else torch.uint8)
    scale = allocate((shape[0], columns // fit_group(columns, config.group)), dtype=torch.float16)
    for part in list_parts(shape):
        found, scale[part] = quantize_groups(rows(part), width, config.search, config.group)
        integers[part] = found if eight else pack(found)
    return integers, scale


def format_report(report: Mapping[str, Any]) -> list[str]:
    """The report of ``quantize`` as lines of text."""
    lines = []
    if "exceptions" in report:
        before, names = report["action_error_without_exceptions"], [one["tensor"] for one in report["exceptions"]]
        lines.append(f"kept in 8 bits (action error {before:.3g} without): {', '.join(names) or 'none'}")
    if "action_error" in report:
        error = report["action_error"]
        lines.append(f"mean action error {error:.3g}, in normalised units, on the observations given for calibration")
    return lines


def quantizable(name: str, tensor: Tensor) -> bool:
    """Whether it is the weight of a linear layer whose inputs fill whole groups (not an embedding)."""
    return (
        tensor.ndim == 2
        and tensor.numel() > 0
        and tensor.shape[1] % GROUP == 0
        and name.endswith(".weight")
        and not name.startswith("embedding")
    )


def choose_bits(tensors: Mapping[str, Tensor], config: QuantizeConfig) -> dict[str, int]:
    """Bits of every tensor to quantize, before exceptions."""
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
    """Raises UserError if an exemption names a tensor that is missing or would not be quantized."""
    for name in config.exempt:
        if name not in tensors or not quantizable(name, tensors[name]):
            choices = ", ".join(other for other, tensor in tensors.items() if quantizable(other, tensor))
            raise UserError(f"expected quantize.exempt to name quantizable tensors ({choices}), found {name!r}")


def check_float16(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor. Raises UserError unless all its values are finite in float16."""
    found = largest_magnitude(tensor)
    if not isfinite(found):
        raise UserError(f"expected finite weights, found NaN or infinity in {name}; repair the checkpoint")
    if found > torch.finfo(torch.float16).max:
        raise UserError(f"expected {name} within float16's range, found {found:.3g}; repair the checkpoint")
    return tensor


def majority_grid(bits: Mapping[str, int], tensors: Tensors) -> Literal["int4", "int8"]:
    """The grid that most quantized weights are on."""
    four, eight = (sum(tensors.meta(name).numel() for name in bits if bits[name] == width) for width in (4, 8))
    return "int4" if four >= eight else "int8"


def overlay(tensors: Tensors, others: Mapping[str, Tensor], names: Container[str]) -> Tensors:
    """The tensors, but those of these ``names`` from ``others``."""
    metas = {name: tensors.meta(name) for name in tensors}
    computed = {name: rows for name, rows in tensors.computed.items() if name not in names}
    computed |= {name: rows_of(others, name) for name in metas if name in names and metas[name].ndim == 2}
    return Tensors(tensors.origin, metas, lambda name: (others if name in names else tensors)[name], computed=computed)


def choose_exceptions(
    error: ActionError,
    tensors: Tensors,
    rounded: Mapping[str, Tensor],
    bits: Mapping[str, int],
    config: QuantizeConfig,
) -> list[dict[str, Any]]:
    """The 4-bit tensors to keep in 8 bits, with the action error and additional bytes of each.

    ``rounded``: dequantized. A tensor's action error is that of the policy with these ``tensors`` in which it alone is
    rounded. Tensors are taken by action error per byte, largest first, while the budget lasts.
    """
    four = [name for name, width in bits.items() if width == 4]

    def size(name: str, width: int) -> int:
        rows, columns = tensors.shape(name)
        return count_bytes(rows * columns, width, fit_group(columns, config.group))

    left = config.budget * sum(size(name, 4) for name in four)
    found = list[dict[str, Any]]()
    for name in four:
        alone = error.measure(overlay(tensors, rounded, {name}))
        found.append({"tensor": name, "action_error": alone, "bytes": size(name, 8) - size(name, 4)})
    chosen = list[dict[str, Any]]()
    for one in sorted(found, key=lambda one: one["action_error"] / one["bytes"], reverse=True):
        if one["bytes"] <= left:
            chosen.append(one)
            left -= one["bytes"]
    return chosen
