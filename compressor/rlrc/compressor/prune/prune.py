"""Structured pruning of a tower: attention heads and MLP channels (width), whole blocks (depth), or both.

As in the paper (arXiv 2506.17639, stage 1), weights that must be cut together (coupling.py) are scored together
(importance.py), and every intermediate block is pruned until a ratio or a target is met (allocation.py, targets.py,
cost.py). First and last blocks are kept, and the remaining parts keep their order. Whole blocks: depth.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.coupling import VISION, Group, Towers, find_groups
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.models.weights import PolicyWeights, count_parameters
from rlrc.compressor.prune import cost, depth
from rlrc.compressor.prune.config import CHOICES, PruneConfig, intermediate_blocks, tower_name
from rlrc.compressor.prune.importance import Scores, score_parts
from rlrc.compressor.prune.outcome import compare_outcomes, format_outcome
from rlrc.compressor.prune.targets import Target, build_target, check_possible, choose_shape
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.training.batches import Batches


def warn(towers: Towers, config: PruneConfig) -> None:
    """Print a warning on stderr for a tower that the paper does not prune."""
    if config.lossless or (name := tower_name(towers, config)) not in (*VISION, "expert"):
        return
    reason = "makes the actions" if name == "expert" else "tolerates far less pruning than a language model"
    line = f"warning: the {name} {reason}: compare the success with the dense policy's, and see the sensitivity report"
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


def check(spec: PolicySpec, towers: Mapping[str, TowerSpec], config: PruneConfig) -> None:
    """Raises UserError for a configuration that is impossible for any weights, before they are loaded."""
    name, dense = tower_name(towers, config), build_on_meta(spec, towers)
    goal = build_target(dense, config)
    if config.kind != "width":
        dense = depth.drop_blocks(dense, _choose_units(dense, name, _candidates(towers, name, config), goal, config))
    if config.kind != "depth":
        check_possible(dense, name, goal, config)


def _candidates(towers: Towers, name: str, config: PruneConfig) -> list[depth.Unit]:
    """Units of blocks that may be dropped."""
    inner = set(intermediate_blocks(towers, name, config))
    return [unit for unit in depth.droppable_units(towers, name) if inner.issuperset(unit[name])]


def _choose_units(
    policy: PolicyModule, name: str, candidates: Sequence[depth.Unit], goal: Target | None, config: PruneConfig
) -> list[depth.Unit]:
    """The units to drop; ``candidates`` are in order of preference."""
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
            f"expected to drop 1 to {len(candidates)} of the {name}'s blocks, found {count}; the others are kept "
            "(--keep), or a kept block depends on them"
        )
    depth.drop_from_towers(towers, candidates[:count])
    return list(candidates[:count])


def prune(
    policy: PolicyModule, config: PruneConfig, batches: Batches | None = None
) -> tuple[PolicyWeights, dict[str, Any]]:
    """Prune a policy. Returns the weights of the smaller policy, cut when they are read, and a report (see
    ``build_report``).

    The given policy is unchanged. ``batches`` for scoring are required if the configuration ``needs_data``. Raises
    UserError as ``check`` does.
    """
    name, dense, dropped = tower_name(policy.towers, config), policy, list[depth.Unit]()
    goal = build_target(dense, config)
    if config.kind != "width":
        candidates = _candidates(dense.towers, name, config)
        if not config.blocks:
            scores = block_scores(dense, name, config, batches)
            candidates.sort(key=lambda unit: sum(scores[tower][i] for tower, blocks in unit.items() for i in blocks))
        dropped = _choose_units(dense, name, candidates, goal, config)
        policy = depth.drop_blocks(dense, dropped)
    pruned = PolicyWeights.of(policy)
    if config.kind != "depth":
        found = score_parts(policy, name, intermediate_blocks(policy.towers, name, config), config, batches)
        pruned = prune_width(policy, name, choose_shape(policy, name, found, goal, config), found)
    made = build_report(dense, build_on_meta(pruned.spec, pruned.towers), name, dropped, config)
    return pruned, made | {"asked": [asdict(outcome) for outcome in compare_outcomes(dense, name, config, made)]}


def block_scores(
    policy: PolicyModule, name: str, config: PruneConfig, batches: Batches | None
) -> dict[str, list[float]]:
    """The score of every block, by tower (of this tower and those whose blocks are dropped with it)."""
    towers = depth.find_units(policy.towers, name)[0]
    found = {
        tower: score_parts(policy, tower, range(len(policy.towers[tower].layers)), config, batches) for tower in towers
    }
    return {tower: [sum(float(x.sum()) for x in score.each()) for score in found[tower]] for tower in towers}


def prune_width(
    policy: PolicyModule, name: str, towers: Mapping[str, TowerSpec], scores: Sequence[Scores]
) -> PolicyWeights:
    """The policy in this shape, with the heads and channels of the highest scores."""
    state, cuts = policy.state_dict(), dict[str, list[tuple[int, Tensor]]]()
    names = tuple(state)
    for i, layer in enumerate(towers[name].layers):
        both = find_groups(policy.towers, name, i, names)
        for group, values, count in zip(both, scores[i].each(), (layer.heads, layer.mlp), strict=True):
            if 0 < count < group.number:
                for part, dimension, kept in list_cuts(group, group.select_best(values, count)):
                    if part in state:
                        cuts.setdefault(part, []).append((dimension, kept))
    shapes = build_on_meta(policy.spec, towers).state_dict()

    def read(name: str) -> Tensor:
        tensor: Tensor = state[name]
        for dimension, kept in cuts.get(name, ()):
            tensor = tensor.index_select(dimension, kept.to(tensor.device))
        return tensor

    metas = {name: meta.to(state[name].dtype) for name, meta in shapes.items()}
    return PolicyWeights(policy.spec, dict(towers), Tensors("the pruned policy", metas, read))


def list_cuts(group: Group, parts: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """What keeps only these parts of the group: a tensor's name, the dimension to select along, and the indices."""
    rows, columns = group.indices(parts, group.fused), group.indices(parts)
    for layer in group.rows:
        yield from ((f"{layer}.{leaf}", 0, rows) for leaf in ("weight", "bias"))
    for layer in group.columns:
        yield f"{layer}.weight", 1, columns


def format_report(report: Mapping[str, Any]) -> list[str]:
    """The report as lines of text: removed ratios, the remaining shape, bytes and time."""
    name, shapes = next(iter(report["shapes"].items()))
    ratios = f"{report['intermediate']:.1%} of the {name}'s intermediate blocks, {report[name]:.1%} of the {name}"
    size = report["bytes"]
    return [
        *(line for outcome in report.get("asked", ()) for line in format_outcome(outcome)),
        f"removed {ratios}, {report['whole']:.1%} of the whole",
        f"left: {len(shapes)} blocks; heads {', '.join(str(heads) for heads, _, _ in shapes)}; "
        f"channels {', '.join(str(mlp) for _, _, mlp in shapes)}",
        f"weights: {size['int4']:,} bytes in int4, {size['bf16']:,} in bf16; by the cost model a decision takes "
        f"{report['time']:.2f}x of the time",
    ]


def build_report(
    dense: PolicyModule, pruned: PolicyModule, name: str, dropped: Sequence[depth.Unit], config: PruneConfig
) -> dict[str, Any]:
    """Removed ratios of every block (heads, channels, parameters), of all intermediate blocks, of every changed tower,
    and of the whole policy; the remaining shape; and its cost."""

    def ratio(before: float, after: float) -> float:
        return round(1 - after / before, 4) if before else 0.0

    layers, before, after = list[dict[str, Any]](), 0, 0
    new = {old: i for i, old in enumerate(depth.remaining_blocks(dense.towers, name, dropped))}
    inner = range(config.keep, len(dense.towers[name].layers) - config.keep)
    for i, layer in enumerate(dense.towers[name].layers):
        sizes = [count_parameters(dense, f"{name}.layers.{i}."), 0]
        heads = mlp = 0
        if i in new:
            rest = pruned.towers[name].layers[new[i]]
            heads, mlp, sizes[1] = rest.heads, rest.mlp, count_parameters(pruned, f"{name}.layers.{new[i]}.")
        layers.append({"heads": ratio(layer.heads, heads), "mlp": ratio(layer.mlp, mlp), "parameters": ratio(*sizes)})
        if i in inner:
            before, after = before + sizes[0], after + sizes[1]
    changed = [tower for tower, spec in dense.towers.items() if spec != pruned.towers[tower] or tower == name]
    shapes = [build_on_meta(policy.spec, policy.towers) for policy in (dense, pruned)]
    return {
        "layers": layers,
        "dropped": {
            tower: sorted(block for unit in dropped for block in unit[tower]) for tower in (dropped or [{}])[0]
        },
        "shapes": {
            tower: [[layer.heads, layer.kv_heads, layer.mlp] for layer in pruned.towers[tower].layers]
            for tower in changed
        },
        "intermediate": ratio(before, after),
        **{tower: ratio(*(count_parameters(policy, f"{tower}.") for policy in (dense, pruned))) for tower in changed},
        "whole": ratio(count_parameters(dense), count_parameters(pruned)),
        "parameters": count_parameters(pruned),
        "bytes": {stored: cost.weight_bytes(shapes[1], stored) for stored in CHOICES["to_bytes_in"] if stored},
        "time": round(cost.decision_cost(shapes[1]) / cost.decision_cost(shapes[0]), 4),
    }
