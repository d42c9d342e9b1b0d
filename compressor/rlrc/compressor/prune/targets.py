"""Finds the shape that meets a ratio or a target.

A target is a limit on a cost (parameters, bytes, time). An allocation (allocation.py) maps one number to a shape;
bisection finds the smallest number whose shape keeps the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.coupling import Towers
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.weights import count_parameters
from rlrc.compressor.prune import cost
from rlrc.compressor.prune.allocation import (
    PruneScope,
    Shape,
    allocate_by_score,
    allocate_by_sensitivity,
    allocate_uniformly,
    read_sensitivity,
)
from rlrc.compressor.prune.config import PruneConfig, fraction_of_time, intermediate_blocks, number_of_bytes, tower_name
from rlrc.compressor.prune.importance import Scores
from rlrc.errors import UserError


@dataclass(frozen=True)
class TargetLimit:
    """A limit on a cost. For messages: ``what`` names the setting, ``describe`` formats a cost."""

    what: str
    cost: Callable[[Towers], float]
    limit: float
    describe: Callable[[float], str]

    def met(self, towers: Towers) -> bool:
        return self.cost(towers) <= self.limit

    def refuse(self, best: Towers, how: str) -> UserError:
        return UserError(
            f"expected a {self.what} of {self.describe(self.cost(best))} or more, the minimum when {how}, found "
            f"{self.describe(self.limit)}; give more, or prune another tower too"
        )


@dataclass(frozen=True)
class Target:
    """Limits that must all be met."""

    limits: tuple[TargetLimit, ...]

    def met(self, towers: Towers) -> bool:
        return all(limit.met(towers) for limit in self.limits)

    def refuse(self, best: Towers, how: str) -> UserError:
        """The error for the first limit that even the best shape exceeds."""
        return next(limit for limit in self.limits if not limit.met(best)).refuse(best, how)


def find_shape(shape: Shape, target: Target) -> dict[str, TowerSpec]:
    """The least pruned shape that meets the target. Raises UserError if none does."""
    low, high = 0.0, 1.0
    before, after = shape(low), smallest(shape, target)
    if target.met(before):
        return before
    while before != after and high - low > 1e-6:
        middle = (low + high) / 2
        if target.met(tried := shape(middle)):
            high, after = middle, tried
        else:
            low, before = middle, tried
    return after


def smallest(shape: Shape, target: Target) -> dict[str, TowerSpec]:
    """The most pruned shape. Raises UserError if it does not meet the target."""
    if not target.met(least := shape(1.0)):
        raise target.refuse(least, "every block has a head for each key/value head and one run of channels")
    return least


def cache_price(spec: PolicySpec, price: Callable[[PolicyModule], float]) -> Callable[[Towers], float]:
    """Make a cost of shapes from a cost of policies. Results are cached."""
    known = dict[Any, float]()

    def cost_of(towers: Towers) -> float:
        key = tuple(towers.items())
        if key not in known:
            known[key] = price(build_on_meta(spec, towers))
        return known[key]

    return cost_of


def build_target(dense: PolicyModule, config: PruneConfig) -> Target | None:
    """The configuration's target; None for a ratio of every intermediate block.

    Raises UserError for a target that the unpruned policy meets.
    """
    spec, name, limits = dense.spec, tower_name(dense.towers, config), list[TargetLimit]()
    if config.to_bytes is not None:
        size = cache_price(spec, lambda policy: cost.weight_bytes(policy, config.to_bytes_in))
        limits.append(
            TargetLimit(
                "prune.to_bytes",
                size,
                number_of_bytes(config.to_bytes),
                lambda size: f"{size:,.0f} bytes in {config.to_bytes_in}",
            )
        )
    if config.to_latency is not None:
        whole = cost.decision_cost(build_on_meta(spec, dense.towers))
        time = cache_price(spec, lambda policy: cost.decision_cost(policy) / whole)
        limits.append(
            TargetLimit("prune.to_latency", time, fraction_of_time(config.to_latency), lambda part: f"{part:.3f}x")
        )
    if config.scope != "layer":
        prefix = f"{name}." if config.scope == "tower" else ""
        before = count_parameters(dense, prefix)
        rest = cache_price(spec, lambda policy: count_parameters(policy, prefix) / before)
        what = f"rest (1 - prune.ratio) of the {config.scope}'s parameters"
        limits.append(TargetLimit(what, rest, 1 - config.part, lambda part: f"{part:.3f}"))
    if not limits:
        return None
    found, first = Target(tuple(limits)), limits[0]
    if found.met(dense.towers):
        now = first.describe(first.cost(dense.towers))
        raise UserError(
            f"expected a {first.what} below {now}, which the unpruned policy has, found "
            f"{first.describe(first.limit)}; give less"
        )
    return found


def choose_shape(
    policy: PolicyModule, name: str, scores: Sequence[Scores] | None, goal: Target | None, config: PruneConfig
) -> dict[str, TowerSpec]:
    """The shape after width pruning; without scores, a uniform allocation."""
    scope = PruneScope(policy, name, intermediate_blocks(policy.towers, name, config), config.align)
    even, shape = allocate_uniformly(scope), _shape(scope, scores, config)
    if goal is not None:
        return find_shape(shape, goal)
    _check_ratio(scope, config)
    towers = even(config.part)
    if config.allocation == "uniform" or scores is None:
        return towers
    # At most as many parameters as the uniform allocation leaves.
    size = cache_price(policy.spec, count_parameters)
    return find_shape(shape, Target((TargetLimit("number of parameters", size, size(towers), "{:,}".format),)))


def check_possible(policy: PolicyModule, name: str, goal: Target | None, config: PruneConfig) -> None:
    """Raises UserError if width pruning cannot reach the goal. ``policy`` may be on the meta device."""
    scope = PruneScope(policy, name, intermediate_blocks(policy.towers, name, config), config.align)
    if goal is None:
        _check_ratio(scope, config)
    else:
        smallest(_shape(scope, None, config), goal)


def _shape(scope: PruneScope, scores: Sequence[Scores] | None, config: PruneConfig) -> Shape:
    if config.allocation == "sensitivity":
        assert config.sensitivity is not None
        return allocate_by_sensitivity(scope, read_sensitivity(Path(config.sensitivity), scope.tower, scope.blocks))
    return (
        allocate_by_score(scope, scores)
        if config.allocation == "global" and scores is not None
        else allocate_uniformly(scope)
    )


def _check_ratio(scope: PruneScope, config: PruneConfig) -> None:
    """Raises UserError if the ratio leaves less than half a head or channel of a block."""
    for i, both in scope.groups().items():
        for what, group in zip(("head", "channel"), both, strict=True):
            if group.number and group.number * (1 - config.part) < 0.5:
                most = 1 - 0.5 / group.number
                raise UserError(
                    f"expected prune.ratio up to {int(most * 1000) / 1000}, which leaves a {what} of "
                    f"{scope.tower}.layers.{i}'s {group.number}, found {config.ratio}; give less"
                )
