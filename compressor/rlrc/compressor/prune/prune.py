"""Structured pruning of a tower: attention heads and MLP channels (width), whole blocks (depth), or both.

As in the paper (arXiv 2506.17639, stage 1): what must be cut together (coupling.py) is scored together (importance.py),
and so much of it goes in every intermediate block that a ratio or a target is met (allocation.py, cost.py). First and
last blocks are kept, and what is kept stays in its order. Blocks that go with others: depth.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.coupling import VISION, Group, Towers, find_groups
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.weights import count_parameters
from rlrc.compressor.prune import cost, depth
from rlrc.compressor.prune.config import CHOICES, PruneConfig, intermediate_blocks, tower_name
from rlrc.compressor.prune.importance import Scores
from rlrc.compressor.prune.importance import score_parts as scores_of
from rlrc.compressor.prune.outcome import compare_outcomes
from rlrc.compressor.prune.outcome import format_outcome as asked_lines
from rlrc.compressor.prune.targets import Target, build_target, check_possible, choose_shape
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.training.batches import Batches


def warn(towers: Towers, config: PruneConfig) -> None:
    """Of towers that the paper leaves alone, a line on stderr."""
    if config.lossless or (name := tower_name(towers, config)) not in (*VISION, "expert"):
        return
    reason = "makes the actions themselves" if name == "expert" else "bears far less than a language model does"
    line = f"warning: the {name} {reason}: compare the success with the dense policy's, and see the sensitivity report"
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


def check(spec: PolicySpec, towers: Mapping[str, TowerSpec], config: PruneConfig) -> None:
    """Raises UserError for what no weights can make possible, before any are read."""
    name, dense = tower_name(towers, config), cost.build_on_meta(spec, towers)
    goal = build_target(dense, config)
    if config.kind != "width":
        dense = depth.drop_blocks(dense, _chosen(dense, name, _candidates(towers, name, config), goal, config))
    if config.kind != "depth":
        check_possible(dense, name, goal, config)


def _candidates(towers: Towers, name: str, config: PruneConfig) -> list[depth.Unit]:
    """Blocks that may go, with what goes with them."""
    inner = set(intermediate_blocks(towers, name, config))
    return [unit for unit in depth.droppable_units(towers, name) if inner.issuperset(unit[name])]


def _chosen(
    policy: PolicyModule, name: str, candidates: Sequence[depth.Unit], goal: Target | None, config: PruneConfig
) -> list[depth.Unit]:
    """Those that go, of candidates in the order in which they would."""
    towers = policy.towers
    if config.blocks:
        units = [depth.find_unit(towers, name, block) for block in config.blocks]
        return [unit for i, unit in enumerate(units) if unit not in units[:i]]
    count = config.drop or (round(config.part * len(candidates)) if goal is None and not config.drop else 0)
    if goal is not None and config.kind == "depth":
        for i in range(len(candidates) + 1):
            if goal.met(depth.drop_from_towers(towers, candidates[:i])):
                return list(candidates[:i])
        raise goal.refuse(depth.drop_from_towers(towers, candidates), "no intermediate block is left")
    if not 0 < count <= len(candidates):
        raise UserError(
            f"expected to drop 1 to {len(candidates)} of the {name}'s blocks, found {count}; the others are the first, "
            "the last (--keep) and those they go with"
        )
    depth.drop_from_towers(towers, candidates[:count])
    return list(candidates[:count])


def prune(
    policy: PolicyModule, config: PruneConfig, batches: Batches | None = None
) -> tuple[PolicyModule, dict[str, Any]]:
    """A smaller policy and a report: what went in each block, of the tower and of the whole, and what that saves.

    The given policy is unchanged; tensors that nothing was cut of are shared with it. ``batches`` are what is scored on
    if the configuration ``needs_data``. Raises UserError as ``check`` does.
    """
    name, dense, gone = tower_name(policy.towers, config), policy, list[depth.Unit]()
    goal = build_target(dense, config)
    if config.kind != "width":
        candidates = _candidates(dense.towers, name, config)
        if not config.blocks:
            worth = block_scores(dense, name, config, batches)
            candidates.sort(key=lambda unit: sum(worth[tower][i] for tower, blocks in unit.items() for i in blocks))
        gone = _chosen(dense, name, candidates, goal, config)
        policy = depth.drop_blocks(dense, gone)
    if config.kind != "depth":
        found = scores_of(policy, name, intermediate_blocks(policy.towers, name, config), config, batches)
        policy = prune_width(policy, name, choose_shape(policy, name, found, goal, config), found)
    made = build_report(dense, policy, name, gone, config)
    return policy, made | {"asked": [asdict(outcome) for outcome in compare_outcomes(dense, name, config, made)]}


def block_scores(
    policy: PolicyModule, name: str, config: PruneConfig, batches: Batches | None
) -> dict[str, list[float]]:
    """What every block is worth, of the tower and of those that go with it: the sum of its parts' scores."""
    towers = depth.find_units(policy.towers, name)[0]
    found = {
        tower: scores_of(policy, tower, range(len(policy.towers[tower].layers)), config, batches) for tower in towers
    }
    return {tower: [sum(float(x.sum()) for x in score.each()) for score in found[tower]] for tower in towers}


def prune_width(
    policy: PolicyModule, name: str, towers: Mapping[str, TowerSpec], scores: Sequence[Scores]
) -> PolicyModule:
    """The policy in this shape, with the best heads and channels of every block."""
    state = dict(policy.state_dict())
    names = tuple(state)
    for i, layer in enumerate(towers[name].layers):
        both = find_groups(policy.towers, name, i, names)
        for group, values, count in zip(both, scores[i].each(), (layer.heads, layer.mlp), strict=True):
            if 0 < count < group.number:
                cut(state, group, group.select_best(values, count))
    return depth.assemble(policy, towers, state)


def cut(state: dict[str, Tensor], group: Group, parts: Tensor) -> None:
    """Leaves only these parts of the group in the state dict."""
    rows, columns = group.indices(parts, group.fused), group.indices(parts)
    for layer in group.rows:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in state:
                state[name] = state[name][rows]
    for layer in group.columns:
        state[f"{layer}.weight"] = state[f"{layer}.weight"][:, columns]


def format_report(report: Mapping[str, Any]) -> list[str]:
    """The report for people: all three ratios, what is left, bytes and time."""
    name, shapes = next(iter(report["shapes"].items()))
    ratios = f"{report['intermediate']:.1%} of the {name}'s intermediate blocks, {report[name]:.1%} of the {name}"
    size = report["bytes"]
    return [
        *(line for outcome in report.get("asked", ()) for line in asked_lines(outcome)),
        f"removed {ratios}, {report['whole']:.1%} of the whole",
        f"left: {len(shapes)} blocks; heads {', '.join(str(heads) for heads, _, _ in shapes)}; "
        f"channels {', '.join(str(mlp) for _, _, mlp in shapes)}",
        f"weights: {size['int4']:,} bytes in int4, {size['bf16']:,} in bf16; by the cost model a decision takes "
        f"{report['time']:.2f}x of the time",
    ]


def build_report(
    dense: PolicyModule, pruned: PolicyModule, name: str, gone: Sequence[depth.Unit], config: PruneConfig
) -> dict[str, Any]:
    """Removed parts: per block of the tower (heads, channels, parameters), of all intermediate blocks, of every tower
    that lost any, and of the whole; what is left; and what ``cost`` says of it."""

    def removed(before: float, after: float) -> float:
        return round(1 - after / before, 4) if before else 0.0

    layers, before, after = list[dict[str, Any]](), 0, 0
    new = {old: i for i, old in enumerate(depth.remaining_blocks(dense.towers, name, gone))}
    inner = range(config.keep, len(dense.towers[name].layers) - config.keep)
    for i, layer in enumerate(dense.towers[name].layers):
        sizes = [count_parameters(dense, f"{name}.layers.{i}."), 0]
        heads = mlp = 0
        if i in new:
            rest = pruned.towers[name].layers[new[i]]
            heads, mlp, sizes[1] = rest.heads, rest.mlp, count_parameters(pruned, f"{name}.layers.{new[i]}.")
        layers.append(
            {"heads": removed(layer.heads, heads), "mlp": removed(layer.mlp, mlp), "parameters": removed(*sizes)}
        )
        if i in inner:
            before, after = before + sizes[0], after + sizes[1]
    changed = [tower for tower, spec in dense.towers.items() if spec != pruned.towers[tower] or tower == name]
    shapes = [cost.build_on_meta(policy.spec, policy.towers) for policy in (dense, pruned)]
    return {
        "layers": layers,
        "dropped": {tower: sorted(block for unit in gone for block in unit[tower]) for tower in (gone or [{}])[0]},
        "shapes": {
            tower: [[layer.heads, layer.kv_heads, layer.mlp] for layer in pruned.towers[tower].layers]
            for tower in changed
        },
        "intermediate": removed(before, after),
        **{tower: removed(*(count_parameters(policy, f"{tower}.") for policy in (dense, pruned))) for tower in changed},
        "whole": removed(count_parameters(dense), count_parameters(pruned)),
        "parameters": count_parameters(pruned),
        "bytes": {stored: cost.weight_bytes(shapes[1], stored) for stored in CHOICES["to_bytes_in"] if stored},
        "time": round(cost.decision_cost(shapes[1]) / cost.decision_cost(shapes[0]), 4),
    }
