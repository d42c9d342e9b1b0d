"""AWQ (arXiv 2306.00978): scale up the input channels that matter before rounding.

The columns of a linear layer are multiplied by s and its inputs divided by s. That changes only how the columns are
rounded: a channel with a large s loses less. s = mean |x|^alpha (section 3.2, equations 4 and 5); of eleven alphas, 0
(no scaling) included, the one with the smallest output error on calibration inputs is used.

The division is folded into the module that makes the inputs, where that is exact, so exported graphs contain no scales.
The module is a norm without other readers, or another linear layer with no nonlinearity in between. Not scaled are
layers after adaptive norms (pi0.5's expert, whose scale depends on the time), values of towers that attend to each
other (pi0, where one row of v feeds two o), layers after GELU or after a norm that the residual stream or positions
read as well (DETR), and projectors, where several columns share a channel of the norm before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlrc.compressor.models.nn import decoder, detr, vit
from rlrc.compressor.models.nn.linear import EVERY
from rlrc.compressor.models.oft import RegressionHead
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.quantize.grid import GROUP, dequantize_groups, quantize_groups

ALPHAS = tuple(i / 10 for i in range(11))
ROWS = 512
"""of the calibration sample, at most, to search alpha with"""
NARROWEST = 1e-4
"""times the largest channel's magnitude, at least: keeps the scales of unused channels bounded"""


@dataclass(frozen=True)
class Fold:
    """Linear layers that share an input, and the module ``before`` that makes it (with its rows from ``first`` on).

    ``offset`` is that of a norm's weight. Where ``shared`` query heads of ``size`` channels read the same value head,
    their channels share a scale.
    """

    linears: tuple[str, ...]
    before: str
    offset: float = 0.0
    first: int = 0
    shared: int = 1
    size: int = 1

    def per_row(self, channels: Tensor) -> Tensor:
        """Input channels (in,) -> means over the channels that each row of ``before`` feeds (rows,)."""
        return channels.view(-1, self.shared, self.size).mean(1).flatten()

    def per_channel(self, rows: Tensor) -> Tensor:
        """(rows,) -> (in,)."""
        return rows.view(-1, 1, self.size).expand(-1, self.shared, -1).flatten()


def find_folds(policy: PolicyModule) -> list[Fold]:
    """All places in the policy where scales can be folded."""
    found = list[Fold]()
    for name, module in policy.named_modules():
        if isinstance(module, decoder.Block):
            found += _decoder_block(name, module, values_shared=policy.spec.flow is not None)
        elif isinstance(module, vit.VisionBlock):
            found += _vision_block(name, module)
        elif isinstance(module, detr.DetrBlock):
            found += _detr_block(name, module)
        elif isinstance(module, RegressionHead):
            found += [Fold((f"{name}.input",), f"{name}.norm1"), Fold((f"{name}.output",), f"{name}.norm2")]
            found += [Fold((f"{name}.blocks.{i}.1",), f"{name}.blocks.{i}.0") for i in range(len(module.blocks))]
    for tower, linear in (("decoder", "head"), ("expert", "action_out")):
        last = getattr(getattr(policy, tower, None), "norm", None)
        if isinstance(getattr(policy, linear, None), nn.Linear) and last is not None:
            found += _after(f"{tower}.norm", last, linear)
    return found


def _after(name: str, norm: Any, *linears: str) -> list[Fold]:
    if isinstance(norm, decoder.RMSNorm):
        return [Fold(linears, name, norm.offset)]
    return [Fold(linears, name)] if isinstance(norm, nn.LayerNorm) else []


def _decoder_block(name: str, block: decoder.Block, values_shared: bool) -> list[Fold]:
    attention, own = block.attention, f"{name}.attention"
    readers = {"self": ("q", "k", "v"), "cross": ("q",), "half": ("k", "v")}[block.kind]
    found = list[Fold]()
    if attention.heads:
        found += _after(f"{name}.norm1", block.norm1, *(f"{own}.{reader}" for reader in readers))
        # No other tower reads a cross block's values.
        if block.kind == "cross" or (block.kind == "self" and not values_shared):
            shared = attention.heads // attention.kv_heads
            found.append(Fold((f"{own}.o",), f"{own}.v", shared=shared, size=attention.head_dim))
    if not block.kv_only and block.mlp.up.out_features:
        found += _after(f"{name}.norm2", block.norm2, f"{name}.mlp.gate", f"{name}.mlp.up")
        found.append(Fold((f"{name}.mlp.down",), f"{name}.mlp.up"))  # activation(gate) * up
    return found


def _vision_block(name: str, block: vit.VisionBlock) -> list[Fold]:
    found = list[Fold]()
    if heads := block.attention.heads:
        found.append(Fold((f"{name}.attention.qkv",), f"{name}.norm1"))
        values = 2 * heads * block.attention.head_dim
        found.append(Fold((f"{name}.attention.out",), f"{name}.attention.qkv", first=values))
    if block.mlp.up.out_features:
        found += [Fold((f"{name}.mlp.up",), f"{name}.norm2"), *_after_relu(f"{name}.mlp", block.mlp)]
    return found


def _detr_block(name: str, block: detr.DetrBlock) -> list[Fold]:
    found = list[Fold]()
    if block.attention.heads:
        found.append(Fold((f"{name}.attention.o",), f"{name}.attention.v"))
    if block.has_mlp:
        found += _after(f"{name}.norm2", block.norm2, f"{name}.mlp.up") if block.pre_norm else []
        found += _after_relu(f"{name}.mlp", block.mlp)
    return found


def _after_relu(name: str, mlp: vit.VisionMLP) -> list[Fold]:
    """relu(x / s) is relu(x) / s; GELU has no such identity."""
    return [Fold((f"{name}.down",), f"{name}.up")] if mlp.activation is decoder.ACTIVATIONS["relu"] else []


def compute_scales(fold: Fold, rows: Tensor, alpha: float) -> Tensor:
    """Inputs (n, in) -> s (rows of ``before``,), normalised so that its largest times its smallest value is 1."""
    magnitude = fold.per_row(rows.abs().mean(0))
    s = magnitude.clamp(min=max(NARROWEST * float(magnitude.max()), torch.finfo().tiny)) ** alpha
    return s / (s.max().sqrt() * s.min().sqrt())  # two roots: the product of tiny numbers would be 0


def fold_scales(
    name: str, tensor: Tensor, fold: Fold, s: Tensor, rows: slice | Tensor = EVERY, count: int | None = None
) -> Tensor:
    """The tensor of this name with s (rows of ``before``,) folded in. The policy computes the same as before.

    ``tensor`` may be some ``rows`` out of ``count``.
    """
    layer, _, leaf = name.rpartition(".")
    if layer in fold.linears and leaf == "weight":
        tensor = tensor * fold.per_channel(s)
    if layer == fold.before and leaf in ("weight", "bias"):
        divisor = s.new_ones(count or len(tensor))
        divisor[fold.first : fold.first + len(s)] = s
        offset = fold.offset if leaf == "weight" else 0.0
        tensor = (tensor.float() + offset) / divisor[rows].view(-1, *(1,) * (tensor.ndim - 1)) - offset
    return tensor


def fold_all(tensors: Tensors, folded: Sequence[tuple[Fold, Tensor]]) -> Tensors:
    """The tensors with these scales folded in, one after the other, when they are read."""

    def compute(name: str, rows: slice | Tensor) -> Tensor:
        tensor = tensors[name][rows]
        for fold, s in folded:
            tensor = fold_scales(name, tensor, fold, s, rows, len(tensors.meta(name)))
        return tensor

    stored = {name: tensors.meta(name).float() for name in tensors}
    computed = {name: partial(compute, name) for name in tensors if stored[name].ndim}
    return Tensors(tensors.origin, stored, tensors.__getitem__, computed=computed)


def scale_channels(
    policy: PolicyModule,
    tensors: Tensors,
    bits: Mapping[str, int],
    inputs: Mapping[str, Tensor],
    search: bool,
    group: int = GROUP,
) -> tuple[Tensors, dict[str, float]]:
    """Tensors of an equivalent policy that loses less by rounding, scaled when they are read, and each fold's alpha by
    the names of its layers.

    ``bits`` of the tensors to round; ``inputs`` (n, in) of their layers; ``search`` and ``group``: see
    ``quantize_groups``.
    """
    folded, alphas = list[tuple[Fold, Tensor]](), dict[str, float]()
    result = fold_all(tensors, folded)
    for fold in find_folds(policy):
        names = [f"{linear}.weight" for linear in fold.linears]
        names = [name for name in names if name in bits and name in inputs]
        if not names:
            continue
        rows = inputs[names[0]].to(result[names[0]].device)
        few = rows[:: -(-len(rows) // ROWS)]
        errors = dict.fromkeys(ALPHAS, 0.0)
        for name in names:
            weight = result[name].float()
            for alpha in ALPHAS:
                columns = fold.per_channel(compute_scales(fold, rows, alpha))
                rounded = dequantize_groups(*quantize_groups(weight * columns, bits[name], search, group)) / columns
                errors[alpha] += float((few @ (rounded - weight).T).square().sum())  # of the outputs
        best = min(errors, key=lambda alpha: errors[alpha])
        alphas["+".join(fold.linears)] = best
        if best:
            folded.append((fold, compute_scales(fold, rows, best)))
    return result, alphas
