"""Importance scores of heads and channels: a sum over the part's weights.

- taylor: |weight * gradient| of the task loss (first-order Taylor; arXiv 2506.17639 stage 1, after LLM-Pruner,
  2305.11627), from each batch's mean gradient, averaged over batches. A gradient is reduced to scores and freed as soon
  as it exists. The values within the blocks of a large policy are computed again in the backward pass, so memory holds
  one layer's weights in float32 and its gradient, one block's activations, and the inputs of all blocks.
- wanda: |weight| times the norm of the weight's input (arXiv 2306.11695), over the same batches.
- magnitude: |weight|, without data. random: a control.

The score of a block is the sum of its parts' scores. ShortGPT's score (arXiv 2403.03853) chose worse blocks of the
reference policy: see docs/decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlrc.compressor.models.coupling import Group, find_groups
from rlrc.compressor.models.device import of_module
from rlrc.compressor.models.nn.linear import Linear, receive_gradients, recompute
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage.tensors import check_finite
from rlrc.compressor.models.weights import count_parameters
from rlrc.compressor.prune.config import PruneConfig
from rlrc.compressor.training.losses import chunk_loss, draw_noise

if TYPE_CHECKING:
    from rlrc.compressor.training.batches import Batch, Batches

LARGE = 100_000_000  # parameters: smaller policies keep the values of all blocks, which takes a quarter less time


@dataclass(frozen=True)
class Scores:
    """Scores of one block: heads (heads,) and channels (mlp,); zeros for a block that was not scored."""

    heads: Tensor
    channels: Tensor

    def each(self) -> tuple[Tensor, Tensor]:
        return self.heads, self.channels


def score_parts(
    policy: PolicyModule, tower: str, blocks: Collection[int], config: PruneConfig, batches: Batches | None = None
) -> list[Scores]:
    """Scores of every block of the tower, zeros for blocks not in ``blocks``. NEED_DATA scores require ``batches``.

    They are computed on the policy's device, and are on the CPU afterwards.
    """
    found, groups, pieces = list[Scores](), list[Group](), dict[str, tuple[Group, Tensor]]()
    names = policy.state_dict().keys()
    for i in range(len(policy.towers[tower].layers)):
        both = find_groups(policy.towers, tower, i, names)
        groups += both
        found.append(Scores(*(torch.zeros(group.number, device=of_module(policy)) for group in both)))
        for group, total in zip(both, found[-1].each(), strict=True):
            if i in blocks and group.number:
                pieces |= {layer: (group, total) for layer in group.layers}
    if config.score == "random":
        generator = torch.Generator().manual_seed(config.seed)
        for total in (total for score in found for total in score.each()):
            total.copy_(torch.rand(len(total), generator=generator))
    elif config.score == "magnitude":
        _weigh(policy, pieces, lambda name, magnitude: magnitude)
    else:
        assert batches is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # flow policies draw noise and times
            (_taylor if config.score == "taylor" else _wanda)(policy, pieces, config, batches)
    result = [Scores(*(total.cpu() for total in score.each())) for score in found]
    for group, total in zip(groups, (total for score in result for total in score.each()), strict=True):
        name = f"scores of {group.layers[0]}"
        check_finite(total, name, f"--score {config.score}", "score by magnitude, or check the data")
    return result


Pieces = dict[str, tuple[Group, Tensor]]  # by layer: its group, and the tensor that accumulates the parts' scores


def _weigh(policy: PolicyModule, pieces: Pieces, importance: Callable[[str, Tensor], Tensor]) -> None:
    for name, (group, total) in pieces.items():
        weight = policy.get_parameter(f"{name}.weight").detach()
        total += group.sum_parts(name, importance(name, weight.abs().float()))


def _taylor(policy: PolicyModule, pieces: Pieces, config: PruneConfig, batches: Batches) -> None:
    layers = {name: cast(Linear, policy.get_submodule(name)) for name in pieces}

    def reduce(name: str, gradient: Tensor) -> None:
        group, total = pieces[name]
        scores = gradient.mul_(layers[name].weight.detach()).abs_()
        total.add_(group.sum_parts(name, scores), alpha=1 / config.batches)

    large = count_parameters(policy) > LARGE
    with _frozen(policy), recompute(policy, large), receive_gradients(layers, reduce):
        for _ in range(config.batches):
            chunk_loss(policy, _draw(policy, config, batches))[0].backward()


def _draw(policy: PolicyModule, config: PruneConfig, batches: Batches) -> Batch:
    """A batch on the policy's device."""
    return draw_noise(policy, batches.draw(config.batch)).to(of_module(policy))


@contextmanager
def _frozen(policy: PolicyModule) -> Iterator[None]:
    """Within the context no parameter requires a gradient. All gradients are cleared before."""
    before = {parameter: parameter.requires_grad for parameter in policy.parameters()}
    policy.eval().zero_grad()
    policy.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _wanda(policy: PolicyModule, pieces: Pieces, config: PruneConfig, batches: Batches) -> None:
    squares = dict[str, Tensor]()

    def add(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares[name] = squares.get(name, 0) + inputs[0].detach().float().flatten(0, -2).square().sum(0)

    policy.eval()
    hooks = [policy.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in pieces]
    try:
        with torch.no_grad():
            for _ in range(config.batches):
                chunk_loss(policy, _draw(policy, config, batches))
    finally:
        _remove(hooks)
    _weigh(policy, pieces, lambda name, magnitude: magnitude * squares[name].sqrt())


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
