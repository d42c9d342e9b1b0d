"""Charts of trade-offs: memory, roofline, success against bytes and time, recovery, other runtimes and devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlrc.benchmarks.report.charts import (
    LINES,
    MARKERS,
    PALETTE,
    PARTS,
    SETTINGS,
    STAGES,
    as_svg,
    fill,
    plain_log,
    styles,
)
from rlrc.benchmarks.results.stats import Estimate

INK, MUTED, CARD = PALETTE["--ink"], PALETTE["--muted"], PALETTE["--card"]
MANY = 12  # policies that colours and markers can distinguish
COLORS = ("--s4", "--s1", "--s3", "--s5", "--s2", "--s0", "--s6", "--s7")


def memory(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw two bars per row: bytes to load, by graph, and memory of a process with its range over runs and its peak."""
    names = [row["name"] for row in rows]
    measured = [row for row in rows if row.get("memory")]
    with matplotlib.rc_context(SETTINGS | {"axes.grid.axis": "x"}):
        figure = Figure((6.4, 1.0 + (0.52 if measured else 0.36) * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        largest, labelled = 0.0, set[str]()
        for y, row in enumerate(rows):
            place = y - 0.19 * bool(row.get("memory"))
            largest = max(largest, _load(axes, row, place, labelled))
            if row.get("memory"):
                largest = max(largest, _resident(axes, row, y + 0.21, labelled))
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="megabytes", xlim=(0, 1.18 * largest), ylim=(len(names) - 0.45, -0.55))
        axes.tick_params(length=0)
        figure.legend(loc="outside lower center", ncols=4)
        return as_svg(figure, "Memory of each policy: bytes to load, by graph, and memory of a process")


def _load(axes: Axes, row: Mapping[str, Any], y: float, labelled: set[str]) -> float:
    """Draw the bar and return its end. Files in float32 that count as bf16 are drawn at their bf16 size."""
    graphs = row.get("graph_bytes") or {"graphs": row["bytes"]}
    scale, left = row["bytes"] / max(1, sum(graphs.values())) / 1e6, 0.0
    for graph, size in graphs.items():
        variable, hatch = PARTS.get({"step": "steps", "embed": "preprocess"}.get(graph, graph), ("--s0", ""))
        label = None if graph in labelled else f"to load: {graph}"
        labelled.add(graph)
        axes.barh(y, size * scale, 0.34, left, label=label, **fill(PALETTE[variable], hatch))
        left += size * scale
    _describe(axes, left, y, f"{left:.2f}" if left < 100 else f"{left:,.0f}")
    return left


def _resident(axes: Axes, row: Mapping[str, Any], y: float, labelled: set[str]) -> float:
    own, spread = row["memory"]["own"], row["memory"].get("own_range")
    size, peak = own["pss"] / 1e6, own["peak"] / 1e6
    label = None if "pss" in labelled else "of a process"
    labelled.add("pss")
    axes.barh(y, max(size, 0.0), 0.24, label=label, **fill(PALETTE["--s0"], "////"))
    if spread:
        low, high = (value / 1e6 for value in spread["pss"])
        axes.errorbar(size, y, xerr=[[size - low], [high - size]], fmt="none", color=INK, elinewidth=0.9, capsize=2)
    axes.plot(peak, y, "|", color=INK, markersize=9, markeredgewidth=1.6)
    _describe(
        axes, max(size, peak), y, f"{size:.1f}, peak {peak:.1f}" if peak < 100 else f"{size:,.0f}, peak {peak:,.0f}"
    )
    return float(max(size, peak))


def _describe(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)


@dataclass(frozen=True)
class RooflinePoint:
    """One part of a policy: operations per byte read, and the attained billions of operations per second."""

    name: str
    part: str
    intensity: float
    gops: Estimate


def roofline(bandwidth: float, peaks: Mapping[str, float], points: Sequence[RooflinePoint]) -> str:
    """Draw the roofline of the machine (GB/s, Gop/s by type of product) and the attained point of each part."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        lowest = min(0.6, *(point.intensity for point in points)) / 1.6
        highest = max(2000.0, *(point.intensity for point in points)) * 1.6
        x = np.geomspace(lowest, highest, 200)
        bottom = min(point.gops.low for point in points) / 2
        for i, (kind, peak) in enumerate(sorted(peaks.items(), key=lambda item: item[1])):
            axes.plot(x, np.minimum(bandwidth * x, peak), color=MUTED, linestyle=LINES[(0, 2, 3)[i % 3]], linewidth=1.2)
            # Stagger the labels horizontally, since peaks may be close to each other.
            anchor = (highest / 7 ** (i % 3), peak)
            axes.annotate(
                f"{kind}: {peak:,.0f}", anchor, (-2, 3), textcoords="offset points", ha="right", fontsize=8, color=MUTED
            )
        middle = (bottom * min(peaks.values())) ** 0.5 / bandwidth
        axes.annotate(
            f"{bandwidth:.0f} GB/s", (middle, bandwidth * middle), (-6, 0), textcoords="offset points", ha="right",
            fontsize=8, color=MUTED,
        )  # fmt: skip
        names = list(dict.fromkeys(point.name for point in points))
        for i, name in enumerate(names):
            for j, point in enumerate(one for one in points if one.name == name):
                at, gops = point.intensity, point.gops
                axes.errorbar(
                    at, gops.value, yerr=[[gops.value - gops.low], [gops.high - gops.value]],
                    fmt=MARKERS[i % len(MARKERS)], color=PALETTE[COLORS[i % len(COLORS)]], markersize=6,
                    elinewidth=0.9, capsize=2, label=name if not j else None,
                )  # fmt: skip
                axes.annotate(point.part, (at, gops.value), (6, -9), textcoords="offset points", fontsize=8, color=INK)
        top = 2 * max(*peaks.values(), *(point.gops.high for point in points))
        axes.set(xscale="log", yscale="log", xlim=(lowest, highest), ylim=(bottom, top))
        axes.set(xlabel="operations per byte read", ylabel="billions of operations per second")
        for axis, (low, high) in ((axes.xaxis, (lowest, highest)), (axes.yaxis, (bottom, top))):
            ticks = [tick for power in range(-3, 7) for digit in (1, 3) if low <= (tick := digit * 10.0**power) <= high]
            axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
            axis.set_ticks([], minor=True)
        figure.legend(loc="outside lower center", ncols=3)
        return as_svg(
            figure, "Roofline: attained performance of each part of an inference against the machine's limits"
        )


def pareto(rows: Sequence[Mapping[str, Any]], medians: Mapping[str, Estimate]) -> str:
    """Draw success against bytes and against median latency (ms with limits); markers on the front are filled.

    With more than MANY rows, only those on the front get their own colour and label.
    """
    front = set(on_front(rows, {name: value.value for name, value in medians.items()}))
    named = front if len(rows) > MANY else {row["name"] for row in rows}
    markers = _assign_markers([row["name"] for row in rows if row["name"] in named])
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((7.6, 4.3), layout="constrained")
        sides = figure.subplots(1, 2, sharey=True)
        for row in sorted(rows, key=lambda row: row["name"] in front):
            name, success = row["name"], _within(row["success"])
            color, marker = markers.get(name, (PALETTE["--s0"], "o"))
            known = name in markers
            style = {
                "fmt": marker,
                "color": color,
                "markerfacecolor": color if name in front else "none",
                "markersize": 6.5 if known else 3.5,
                "elinewidth": 0.9 if known else 0.4,
                "capsize": 1.8 if known else 0,
            }
            low, high = (_within(limit) for limit in row["interval"])
            yerr = [[max(0.0, success - low)], [max(0.0, high - success)]]
            sides[0].errorbar(row["bytes"] / 1e6, success, yerr=yerr, label=name if known else None, **style)
            median = medians[name]
            xerr = [[median.value - median.low], [median.high - median.value]]
            sides[1].errorbar(median.value, success, yerr=yerr, xerr=xerr, **style)
        for axes, label in zip(sides, ("megabytes to load", "milliseconds per inference, median"), strict=True):
            axes.set(xscale="log", xlabel=f"{label}, logarithmic")
            plain_log(axes, *axes.get_xlim())
            _odds(axes)
        sides[0].set_ylabel("success, with 95 % Wilson intervals")
        figure.legend(loc="outside lower center", ncols=4)
        return as_svg(figure, "Success against bytes and latency; filled: the Pareto front")


def _within(success: float) -> float:
    """Clip a success rate: 0 and 1 have no position on a logit scale."""
    return min(max(success, 0.002), 0.998)


def _odds(axes: Axes) -> None:
    """Set a logit scale, which separates success rates near 1."""
    low, high = axes.get_ylim()
    axes.set_yscale("logit")
    ticks = [tick for tick in (0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99) if low - 0.02 <= tick <= high + 0.02]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def on_front(rows: Sequence[Mapping[str, Any]], medians: Mapping[str, float]) -> list[str]:
    """Names on the Pareto front of bytes, latency and success."""

    def costs(row: Mapping[str, Any]) -> tuple[float, float, float]:
        return row["bytes"], medians[row["name"]], -row["success"]

    def is_dominated(row: Mapping[str, Any]) -> bool:
        cost = costs(row)
        return any(
            all(a <= b for a, b in zip(costs(other), cost, strict=True)) and costs(other) != cost for other in rows
        )

    return [row["name"] for row in rows if not is_dominated(row)]


def _assign_markers(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Assign colour and marker. With more names than colours, names that share a colour differ in marker."""
    if any(name in STAGES for name in names):
        return {name: (style.color, style.marker) for name, style in styles(names).items()}
    n = len(COLORS)
    return {name: (PALETTE[COLORS[i % n]], MARKERS[(i + i // n) % len(MARKERS)]) for i, name in enumerate(names)}


@dataclass(frozen=True)
class RecoveryCurve:
    """A kind of recovery: (CPU-minutes, success, low, high) of every seed; ``paths``: (CPU-minutes, success) before."""

    name: str
    seeds: Sequence[tuple[float, float, float, float]]
    paths: Sequence[Sequence[tuple[float, float]]] = ()


def recovery(panels: Mapping[str, Sequence[RecoveryCurve]], levels: Mapping[str, float]) -> str:
    """Draw success against CPU-minutes, one point per seed; ``levels``: horizontal lines, name -> success."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((3.9 * len(panels), 4.4), layout="constrained")
        sides = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, arms) in zip(sides, panels.items(), strict=True):
            markers = _assign_markers([arm.name for arm in arms])
            for arm in arms:
                color, marker = markers[arm.name]
                x, y, low, high = np.array(arm.seeds).T
                y, low, high = (np.clip(values, 0.002, 0.998) for values in (y, low, high))
                error = np.clip([y - low, high - y], 0, None)
                axes.errorbar(
                    x, y, yerr=error, fmt=marker, color=color, markersize=4.5, elinewidth=0.8, capsize=1.6,
                    label=arm.name,
                )  # fmt: skip
                for path in arm.paths:
                    axes.plot(*np.array(path).T, color=color, linewidth=0.9, alpha=0.5)
            for name, level in levels.items():
                axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=":")
                axes.annotate(name, (1, level), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                              ha="right", fontsize=8, color=MUTED)  # fmt: skip
            _odds(axes)
            axes.set_title(title, loc="left", color=INK)
            axes.set_xlabel("CPU-minutes of recovery")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=7.5)
        sides[0].set_ylabel("success, with 95 % intervals")
        return as_svg(figure, "Success after recovery against its CPU-minutes, by kind of recovery")


def ratios(estimates: Mapping[str, Estimate], wanted: float | None = None) -> str:
    """Draw the latency of other runtimes as multiples of rlrc's; ``wanted``: a dashed line at the target ratio."""
    names = list(estimates)
    with matplotlib.rc_context(SETTINGS | {"axes.grid.axis": "x"}):
        figure = Figure((5.6, 0.9 + 0.34 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        values = np.array([one.value for one in estimates.values()])
        limits = np.array([[one.low, one.high] for one in estimates.values()])
        error = [values - limits[:, 0], limits[:, 1] - values]
        axes.barh(names, values, 0.6, **fill(PALETTE["--s0"], "////"))
        for color, width in ((CARD, 2.6), (INK, 0.9)):
            axes.errorbar(values, range(len(names)), xerr=error, fmt="none", color=color, elinewidth=width, capsize=2)
        for y, one in enumerate(estimates.values()):
            _describe(axes, one.high, y, f"{one.value:.1f}x")
        if wanted is not None:
            axes.axvline(wanted, color=PALETTE["--s1"], linewidth=1, linestyle=LINES[2])
        axes.axvline(1, color=MUTED, linewidth=1)
        axes.set(
            xlabel="multiples of rlrc's latency, medians with 95 % intervals",
            xlim=(0, 1.12 * max(1.0, *limits[:, 1])),
        )
        axes.invert_yaxis()
        axes.tick_params(length=0)
        return as_svg(figure, "Latency of other runtimes in multiples of rlrc's")


def predictions(panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> str:
    """Draw predicted latencies. ``panels``: geometry -> kind of policy -> device -> ms (compiled to plain kernels)."""
    devices = list(dict.fromkeys(name for kinds in panels.values() for one in kinds.values() for name in one))
    with matplotlib.rc_context(SETTINGS):
        rows = -(-len(panels) // 2)
        figure = Figure((7.6, 0.5 + rows * (0.75 + 0.24 * len(devices))), layout="constrained")
        grid = figure.subplots(rows, min(2, len(panels)), squeeze=False)
        for axes, (title, kinds) in zip(grid.flat, panels.items(), strict=False):
            for i, (kind, predicted) in enumerate(kinds.items()):
                y = np.array([devices.index(name) for name in predicted]) + 0.22 * (i - (len(kinds) - 1) / 2)
                x = np.array([value.value for value in predicted.values()])
                limits = np.array([[value.low, value.high] for value in predicted.values()])
                error = np.clip([x - limits[:, 0], limits[:, 1] - x], 0, None)
                axes.errorbar(
                    x, y, xerr=error, fmt=MARKERS[i], color=PALETTE[COLORS[i]], markersize=4.5, elinewidth=1, capsize=2,
                    label=kind if axes is grid.flat[0] else None,
                )  # fmt: skip
            axes.set_yticks(range(len(devices)), devices)
            axes.set(xscale="log", ylim=(len(devices) - 0.5, -0.5), xlabel="milliseconds per chunk, logarithmic")
            axes.set_title(title, loc="left", color=INK)
            plain_log(axes, *axes.get_xlim())
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.legend(loc="outside lower center", ncols=3)
        return as_svg(figure, "Predicted latency by device, from compiled to plain kernels")
