"""Compares what ``rlrc prune`` was asked to remove with what it removed, and explains the difference.

Widths are aligned, heads are removed whole, and key/value heads that several query heads share are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.weights import count_parameters
from rlrc.compressor.prune.allocation import PruneScope, allocate_uniformly
from rlrc.compressor.prune.config import PruneConfig, fraction_of_time, intermediate_blocks, number_of_bytes

NEAR = 0.005  # a smaller difference is not reported
FINER = (16, 8, 4, 2, 1)  # alignments that may come closer to the request


@dataclass(frozen=True)
class PruneOutcome:
    """``asked`` and ``got``: ratios of ``what`` to remove, or limits in its unit; ``nearer``: another alignment."""

    what: str
    asked: float
    got: float
    reasons: tuple[str, ...] = ()
    nearer: Mapping[str, float] | None = None


def compare_outcomes(
    dense: PolicyModule, name: str, config: PruneConfig, report: Mapping[str, Any]
) -> list[PruneOutcome]:
    """Outcomes for a pruned tower; ``report``: see ``prune.build_report``. ``dense`` may be on the meta device."""
    if config.to_bytes or config.to_latency:
        limits = ("to_bytes", number_of_bytes(config.to_bytes), report["bytes"][config.to_bytes_in])
        times = ("to_latency", fraction_of_time(config.to_latency), report["time"])
        return [PruneOutcome(*each) for each in (limits, times) if each[1]]
    if config.kind == "both" or (config.kind == "depth" and (config.drop or config.blocks)):
        return []  # the number of blocks was given
    part = {"layer": "intermediate", "tower": name, "whole": "whole"}[config.scope]
    what = {"layer": f"{name}'s intermediate blocks", "tower": name, "whole": "whole policy"}[config.scope]
    found = PruneOutcome(what, config.part, report[part])
    if abs(found.asked - found.got) < NEAR:
        return [found]
    if config.kind == "depth":
        return [replace(found, reasons=("blocks go whole",))]
    scope = PruneScope(dense, name, intermediate_blocks(dense.towers, name, config), config.align)
    reasons = tuple(dict.fromkeys(_reasons(scope, config)))
    nearer = _nearer(scope, config, found) if config.scope == "layer" else None
    return [replace(found, reasons=reasons, nearer=nearer)]


def _reasons(scope: PruneScope, config: PruneConfig) -> list[str]:
    found = list[str]()
    layers = scope.policy.towers[scope.tower].layers
    for i, (heads, channels) in scope.groups().items():
        for group in (heads, channels):
            exact = group.number // max(1, group.kv_groups) * (1 - config.part)
            if group.number and group.multiple > 1 and exact % group.multiple:
                found.append(f"widths stay multiples of {config.align}")
            elif group.number and exact % 1 > 1e-9 and group.size > 1:
                found.append("heads go whole")
        if heads.number and layers[i].kv_heads != layers[i].heads:
            found.append("heads that several query heads share stay")
    if config.scope != "layer":
        found.append("first and last blocks stay")
    return sorted(found, reverse=True) or ["norms and biases stay"]


def _nearer(scope: PruneScope, config: PruneConfig, found: PruneOutcome) -> dict[str, float] | None:
    """The coarsest alignment that comes closer by more than 0.01, and the ratio that it gives."""
    dense = build_on_meta(scope.policy.spec, scope.policy.towers)
    blocks = [f"{scope.tower}.layers.{i}." for i in scope.blocks]
    before = sum(count_parameters(dense, block) for block in blocks)
    for align in FINER:
        if align >= config.align:
            continue
        towers = allocate_uniformly(replace(scope, align=align))(config.part)
        pruned = build_on_meta(scope.policy.spec, towers)
        got = round(1 - sum(count_parameters(pruned, block) for block in blocks) / before, 4)
        if abs(found.asked - got) < abs(found.asked - found.got) - 0.01:
            return {"align": align, "got": got}
    return None


def format_outcome(outcome: Mapping[str, Any]) -> list[str]:
    """The outcome as lines of text; none if the requested ratio was reached."""
    asked, got = outcome["asked"], outcome["got"]
    if outcome["what"] == "to_bytes":
        return [f"asked for at most {asked:,.0f} bytes, got {got:,}"]
    if outcome["what"] == "to_latency":
        return [f"asked for at most {asked:g}x of the time, got {got:g}x"]
    if abs(asked - got) < NEAR:
        return []
    nearer = ""
    if outcome["nearer"]:
        nearer = f"; nearer, at widths that 4-bit groups do not fill: --align {outcome['nearer']['align']:g} gives "
        nearer += f"{outcome['nearer']['got']:.1%}"
    return [f"asked for {asked:.1%} of the {outcome['what']}, got {got:.1%}: {', '.join(outcome['reasons'])}{nearer}"]
