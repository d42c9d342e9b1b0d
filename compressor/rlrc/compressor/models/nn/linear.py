"""Linear layers and word embeddings that compute with weights as they are stored.

A policy of 7 B parameters is 15 GB in bfloat16, mapped from its files; in float32 it would be 30 GB of memory. A weight
therefore keeps its type, and is widened to the type of its input while it is multiplied, in the backward pass once
more. Widening is exact, so the results are those of a policy in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 64  # bytes, as torch allocates

Module = TypeVar("Module", bound=nn.Module)
GradientHook = Callable[[Tensor], object]
"""Takes the gradient of a weight (out, in), in the type of the layer's input."""


class Linear(nn.Linear):
    """A linear layer. Its weight may have another floating-point type than its input, or be computed on demand.

    ``source`` returns the weight, from integers for example; then ``weight`` has a shape and no data. ``hook`` takes
    the gradient of the weight, which is then not accumulated in ``weight.grad``.
    """

    source: Callable[[], Tensor] | None = None
    hook: GradientHook | None = None

    def read(self) -> Tensor:
        """The weight (out, in), as stored or from ``source``."""
        return self.weight if self.source is None else self.source()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.read()
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, self.bias)
        if torch.is_grad_enabled() and (self.hook is not None or not _is_ready(weight, x.dtype)):
            found: Tensor = _Widened.apply(x, weight, self.bias, self.hook)  # type: ignore[no-untyped-call]
            return found
        return F.linear(x, _ready(weight, x.dtype), self.bias)


class Embedding(nn.Embedding):
    """Rows of a table. ``widens``: they are returned in float32, whatever the type of the table.

    ``source``: see ``Linear``.
    """

    source: Callable[[], Tensor] | None = None
    widens = False

    def read(self) -> Tensor:
        """The table, as stored or from ``source``."""
        return self.weight if self.source is None else self.source()

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.read())
        return rows.float() if self.widens else rows


def _is_ready(weight: Tensor, dtype: torch.dtype) -> bool:
    """Products with mapped weights that begin at an odd address differ in the last bits: such weights are copied."""
    return weight.dtype == dtype and (weight.device.type != "cpu" or weight.data_ptr() % ALIGNED == 0)


def _ready(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the type of a product's input."""
    return weight if _is_ready(weight, dtype) else weight.to(dtype, copy=True)


class _Widened(torch.autograd.Function):
    """``F.linear`` that keeps the stored weight for the backward pass, not a widened copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, hook: GradientHook | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.hook, ctx.has_bias = hook, bias is not None
        return F.linear(x, _ready(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, (gradient,) = x.flatten(0, -2), (each.flatten(0, -2) for each in gradients)
        inputs = weights = biases = None
        if ctx.needs_input_grad[0]:
            inputs = (gradient @ _ready(weight, x.dtype)).view_as(x)
        if ctx.needs_input_grad[1]:
            weights = gradient.T @ rows
            if ctx.hook is not None:
                ctx.hook(weights)
                weights = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            biases = gradient.sum(0)
        return inputs, weights, biases, None


def stores(module: nn.Module, leaf: str) -> bool:
    """Whether this parameter of the module may keep the type in which it is stored."""
    return leaf == "weight" and isinstance(module, Linear | Embedding)


def widen(policy: Module) -> Module:
    """Make all weights float32 in memory, in place, for many passes or for training. Returns the policy."""
    for module in policy.modules():
        if isinstance(module, Linear | Embedding) and module.source is not None:
            module.weight = nn.Parameter(module.source(), requires_grad=module.weight.requires_grad)
            module.source = None
        if isinstance(module, Embedding):
            module.widens = False
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    return policy


class Recomputing(nn.Module):
    """A stack of blocks. ``recompute``: the backward pass computes each block again instead of keeping its values."""

    recompute = False

    def block(self, block: nn.Module, *given: Any) -> Any:
        """The block's outputs."""
        if not self.recompute or not torch.is_grad_enabled():
            return block(*given)
        from torch.utils.checkpoint import checkpoint  # imports torch._dynamo, which takes seconds

        return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recompute(policy: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within the context, backward passes hold the values of one block at a time. Gradients are the same."""
    stacks = [module for module in policy.modules() if isinstance(module, Recomputing)]
    for stack in stacks:
        stack.recompute = wanted
    try:
        yield
    finally:
        for stack in stacks:
            stack.recompute = False
