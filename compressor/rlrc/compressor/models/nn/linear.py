"""Linear layers and word embeddings that compute with weights as they are stored.

A policy of 7 B parameters is 15 GB in bfloat16, mapped from its files; in float32 it would be 30 GB of memory. A weight
therefore keeps its type, and is widened to the type of its input while it is multiplied, in the backward pass once
more. Widening is exact, so the results are those of a policy in float32. Integers are dequantized in the same way, some
rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 64  # bytes, as torch allocates
PART = 2**19  # numbers that are widened at a time: 2 MB in float32, which caches hold
EVERY = slice(None)

Rows = Callable[[slice | Tensor], Tensor]
"""Some rows of a matrix, by slice or by number (n,)."""

Module = TypeVar("Module", bound=nn.Module)


class Stored(nn.Module):
    """A layer with one ``weight``. ``source`` computes rows of it, from integers for example; then ``weight`` has a
    shape alone.

    A weight from a source stays where it is when the module moves to a device, and goes there when it is used.
    """

    source: Rows | None = None

    def read(self) -> Tensor:
        """The weight, as stored or from ``source``."""
        return cast(Tensor, self.weight) if self.source is None else self.source(EVERY)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.source is None:
            return super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        weight = self._parameters.pop("weight")
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        self._parameters = {"weight": weight, **self._parameters}
        return self


class Linear(Stored, nn.Linear):
    """A linear layer. Its weight (out, in) may have another floating-point type and device than its input.

    ``receiver`` is a leaf of the weight's shape in float32 that gets the weight's gradient instead of the weight: see
    ``receive_gradients``.
    """

    receiver: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.read().to(x.device), self.bias)
        matrix = _Matrix(self.weight, self.source)
        if torch.is_grad_enabled() and (self.receiver is not None or not matrix.is_ready(x)):
            weight = self.weight if self.source is None else self.weight.detach()
            found: Tensor = _Widened.apply(x, matrix, weight, self.bias, self.receiver)  # type: ignore[no-untyped-call]
            return found
        return _multiply(x, matrix, self.bias)


class Embedding(Stored, nn.Embedding):
    """Rows of a table, in the type of the module as it was built or as ``Module.to`` set it.

    The table may have another type.
    """

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type]
        self.dtype = self.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        if self.source is not None:
            return self.source(ids.flatten().cpu()).view(*ids.shape, -1).to(ids.device, self.dtype)
        return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device, self.dtype)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(function, recurse)


@dataclass(frozen=True)
class _Matrix:
    """A weight (out, in), computed by ``source`` if there is one."""

    weight: Tensor
    source: Rows | None

    def is_ready(self, x: Tensor) -> bool:
        """Whether it can be multiplied with ``x`` as it is stored.

        Products with mapped weights that begin at an odd address differ in the last bits: such weights are copied.
        """
        same = self.source is None and self.weight.dtype == x.dtype and self.weight.device == x.device
        return same and (self.weight.device.type != "cpu" or self.weight.data_ptr() % ALIGNED == 0)

    def is_divided(self, x: Tensor) -> bool:
        """Whether it is multiplied in parts: on the CPU they stay in the caches."""
        return self.weight.numel() > PART and x.device.type in ("cpu", "meta") and not self.is_ready(x)

    def read(self, x: Tensor) -> Tensor:
        """In the type of ``x``, on its device."""
        if self.source is not None:
            return self.source(EVERY).to(x)
        return self.weight if self.is_ready(x) else self.weight.to(x.device, x.dtype, copy=True)

    def parts(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after the others, in the type of ``x``. Each part replaces the one before.

        On the meta device the first one stands for all.
        """
        room: Tensor | None = None
        for rows in list_parts(self.weight.shape):
            stored = self.weight[rows] if self.source is None else self.source(rows)
            room = x.new_empty(stored.shape) if room is None else room
            yield rows, room[: len(stored)].copy_(stored)
            if x.is_meta:
                return


def list_parts(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of a matrix of this shape (out, in), as many as are computed at a time."""
    step = max(1, PART // max(1, shape[1]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _multiply(x: Tensor, matrix: _Matrix, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a weight that may have to be widened or computed."""
    if not matrix.is_divided(x):
        return F.linear(x, matrix.read(x), bias)
    found = x.new_empty(*x.shape[:-1], len(matrix.weight))
    for rows, part in matrix.parts(x):
        found[..., rows] = F.linear(x, part)
    return found if bias is None else found.add_(bias)


def _multiply_back(gradient: Tensor, matrix: _Matrix, x: Tensor) -> Tensor:
    """Gradient (n, out) of a product -> that of its input ``x`` (n, in)."""
    if not matrix.is_divided(x):
        return gradient @ matrix.read(x)
    found = gradient.new_zeros(len(gradient), matrix.weight.shape[1])
    for rows, part in matrix.parts(x):
        found.addmm_(gradient[:, rows], part)
    return found


class _Widened(torch.autograd.Function):
    """``F.linear`` that keeps the stored weight for the backward pass, not a widened copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: _Matrix, weight: Tensor, bias: Tensor | None, receiver: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.source = matrix.source
        return _multiply(x, matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, (gradient,) = x.flatten(0, -2), (each.flatten(0, -2) for each in gradients)
        needs_input, _, needs_weight, needs_bias, needs_received = ctx.needs_input_grad
        inputs = _multiply_back(gradient, _Matrix(weight, ctx.source), x).view_as(x) if needs_input else None
        weights = gradient.T @ rows if needs_weight or needs_received else None
        biases = gradient.sum(0) if needs_bias else None
        return inputs, None, weights if needs_weight else None, biases, weights if needs_received else None


@contextmanager
def receive_gradients(layers: Mapping[str, Linear], use: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Within the context ``use(name, gradient)`` gets the gradients (out, in) of these weights, in float32.

    It is called once in a backward pass, with the sum over all calls of the layer, and nothing is kept afterwards.
    """
    for name, layer in layers.items():
        leaf = torch.zeros((), device=layer.weight.device).expand(layer.weight.shape).detach().requires_grad_()

        def take(leaf: Tensor, name: str = name) -> None:
            assert leaf.grad is not None
            use(name, leaf.grad)
            leaf.grad = None

        leaf.register_post_accumulate_grad_hook(take)
        layer.receiver = leaf
    try:
        yield
    finally:
        for layer in layers.values():
            layer.receiver = None


def widen(policy: Module) -> Module:
    """Make all weights float32 in memory, in place, for many passes or for training. Returns the policy."""
    for module in policy.modules():
        if isinstance(module, Stored) and module.source is not None:
            module.weight = nn.Parameter(
                module.source(EVERY), requires_grad=module.get_parameter("weight").requires_grad
            )
            module.source = None
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


def list_block_types(module: nn.Module) -> list[str]:
    """Names of the classes of the blocks of all stacks in the module."""
    stacks = [stack for stack in module.modules() if isinstance(stack, Recomputing)]
    lists = [child for stack in stacks for child in stack.children() if isinstance(child, nn.ModuleList)]
    return sorted({type(block).__name__ for blocks in lists for block in blocks})


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
