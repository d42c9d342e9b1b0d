"""Charts of the report as inline SVG that follows the page's colours, and the result table as a picture.

Series differ in colour and in hatch, line style or marker. A chart is drawn with the light palette. Each palette
colour is then replaced by the CSS variable of the same role, so that one SVG serves both light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# CSS variable -> light value; report.css defines the dark values.
PALETTE = {
    "--card": "#ffffff",
    "--ink": "#1b2430",
    "--muted": "#5d6876",
    "--line": "#d6dce4",
    "--s0": "#6b7686",
    "--s1": "#c2541b",
    "--s2": "#a67c00",
    "--s3": "#0f7b6c",
    "--s4": "#2457d6",
    "--s5": "#8c3fa8",
    "--s6": "#7c4a2d",
    "--s7": "#4d7a1f",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": PALETTE["--ink"],
    "axes.labelcolor": PALETTE["--muted"],
    "axes.edgecolor": PALETTE["--line"],
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": PALETTE["--line"],
    "grid.linewidth": 0.6,
    "xtick.color": PALETTE["--line"],
    "ytick.color": PALETTE["--line"],
    "xtick.labelcolor": PALETTE["--muted"],
    "ytick.labelcolor": PALETTE["--ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 1.0,
}
STAGES = ("dense", "pruned", "pruned+sft", "pruned+sft+ppo", "compressed")
LINES = (
    "-",
    (0, (1, 1.2)),
    (0, (4, 1.5)),
    (0, (5, 1.5, 1, 1.5)),
    "-",
    (0, (2, 2)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "s", "^", "D", "*", "v", "P", "X")
_HATCHES = ("", "////", "..", "\\\\\\\\", "", "xxxx", "----", "++++")
# Colour and hatch of each part of an inference and of the graphs in the memory chart.
PARTS = {
    "preprocess": ("--s2", ".."),
    "vision": ("--s3", "\\\\\\\\"),
    "prefix": ("--s4", ""),
    "prefill": ("--s4", ""),
    "decoder": ("--s4", ""),
    "decode": ("--s5", "xxxx"),
    "steps": ("--s5", "xxxx"),
    "head": ("--s7", "----"),
    "postprocess": ("--s1", "////"),
}
STEPS = 160  # points per distribution curve
METRICS = {
    "loss": "loss",
    "l1": "mean action error",
    "success": "success",
    "approx_kl": "approximate KL",
    "clip_fraction": "clipped fraction",
    "explained_variance": "explained variance",
    "entropy": "entropy",
}


@dataclass(frozen=True)
class Style:
    color: str
    line: Any
    marker: str
    hatch: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Assign each stage the same style in every chart; other rows take the remaining styles in order."""
    others = [name for name in names if name not in STAGES]
    assigned = {}
    for name in names:
        i = STAGES.index(name) if name in STAGES else len(STAGES) + others.index(name)
        color = i if name in STAGES else 5 + others.index(name) % 3
        # Rows that share a colour differ in line, marker and hatch.
        assigned[name] = Style(PALETTE[f"--s{color}"], LINES[i % 8], MARKERS[(i + i // 8) % 8], _HATCHES[i % 8])
    return assigned


def latency(trials: Mapping[str, Sequence[float]]) -> str:
    """Draw the share of inferences that took at most x milliseconds; mark the median and the 99th percentile."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((5.6, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for name, style in styles(list(trials)).items():
            values = np.sort(trials[name])
            # More points than pixel rows would only enlarge the file; the 20 slowest trials are always kept.
            kept = np.unique(
                np.concatenate([np.linspace(0, len(values) - 1, STEPS), np.arange(len(values))[-20:]]).astype(int)
            )
            share = (kept + 1) / len(values)
            axes.step(
                values[kept], share, where="post", color=style.color, linestyle=style.line, linewidth=1.8, label=name
            )
            marks = np.percentile(values, [50, 99])
            axes.plot(marks, [0.5, 0.99], style.marker, color=style.color, markersize=5)
        low, high = min(map(min, trials.values())) * 0.92, max(map(max, trials.values())) * 1.08
        axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.02), xlabel="milliseconds per inference, logarithmic")
        axes.set_ylabel("share of inferences")
        plain_log(axes, low, high)
        figure.legend(loc="outside lower center", ncols=3)
        return as_svg(figure, "Distribution of the latency of an inference, by policy")


def plain_log(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic x-axis with round numbers, as many as fit."""
    for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        ticks = [tick for power in range(-4, 7) for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        if len(ticks) <= 9:
            break
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def parts(medians: Mapping[str, Mapping[str, float]]) -> str:
    """Draw one bar per policy: stacked medians of the parts of an inference. ``medians``: name -> part -> ms."""
    with matplotlib.rc_context(SETTINGS | {"axes.grid.axis": "x"}):
        figure = Figure((5.6, 1.1 + 0.36 * len(medians)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(medians))
        for part in (part for part in PARTS if any(part in row for row in medians.values())):
            widths = np.array([row.get(part, 0.0) for row in medians.values()])
            variable, hatch = PARTS[part]
            axes.barh(list(medians), widths, 0.62, left, label=part, **fill(PALETTE[variable], hatch))
            left += widths
        for y, total in enumerate(left):
            axes.annotate(
                f"{total:.2f} ms", (total, y), (4, 0), textcoords="offset points", va="center", color=PALETTE["--ink"]
            )
        axes.set(xlabel="milliseconds, medians", xlim=(0, left.max() * 1.16))
        axes.invert_yaxis()
        axes.tick_params(length=0)
        figure.legend(loc="outside lower center", ncols=5)
        return as_svg(figure, "Median time of each part of an inference, by policy")


def success(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the success rate of every task with its 95 % interval: one group of bars per task, one bar per row."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["per_task"]))
    height = 0.8 / len(rows)
    with matplotlib.rc_context(SETTINGS | {"axes.grid.axis": "x"}):
        figure = Figure((6.4, 0.9 + len(tasks) * (0.16 + 0.12 * len(rows))), layout="constrained")
        axes = figure.add_subplot()
        for i, (row, style) in enumerate(zip(rows, styles([row["name"] for row in rows]).values(), strict=True)):
            entries = [(y, row["per_task"][task]) for y, task in enumerate(tasks) if task in row["per_task"]]
            y = np.array([y for y, _ in entries]) + (i - (len(rows) - 1) / 2) * height
            rate = np.array([entry["success"] for _, entry in entries])
            limits = np.array([entry["interval"] for _, entry in entries])
            axes.barh(y, rate, height * 0.86, label=row["name"], **fill(style.color, style.hatch))
            error = np.clip([rate - limits[:, 0], limits[:, 1] - rate], 0, None)
            # A halo in the background colour keeps the whisker visible both on the bar and outside it.
            for variable, width in (("--card", 2.6), ("--ink", 0.9)):
                axes.errorbar(rate, y, xerr=error, fmt="none", color=PALETTE[variable], elinewidth=width, capsize=1.6)
        axes.set_yticks(range(len(tasks)), [_task(task) for task in tasks])
        axes.set(xlim=(0, 1.01), ylim=(len(tasks) - 0.5, -0.5), xlabel="success rate, with 95 % Wilson intervals")
        axes.tick_params(length=0)
        figure.legend(loc="outside upper center", ncols=3)
        return as_svg(figure, "Success rate of every task with 95 % confidence intervals, by policy")


def _task(name: str) -> str:
    """drawer-open-v3/shared -> "drawer open, shared scene"."""
    base, slash, _ = name.partition("/")
    return re.sub(r"-v\d+$", "", base).replace("-", " ") + (", shared scene" if slash else "")


def curves(stage: str, runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """Draw one panel per metric. ``runs``: name of the run -> metric -> (step, value)."""
    metrics = [metric for metric in METRICS if any(metric in run for run in runs.values())]
    columns = min(3, len(metrics))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((2.4 * columns, 0.45 + 1.7 * -(-len(metrics) // columns)), layout="constrained")
        grid = figure.subplots(-(-len(metrics) // columns), columns, squeeze=False)
        colors = dict(zip(runs, ("--s4", "--s1", "--s3", "--s5", "--s2", "--s0"), strict=False))
        for axes, metric in zip(grid.flat, metrics, strict=False):
            for i, (name, variable) in enumerate(colors.items()):
                if metric not in runs[name]:
                    continue
                steps, values = np.array(runs[name][metric], dtype=float).T
                smooth = _smooth(values)
                label = name if metric == metrics[0] else None
                few = {"marker": MARKERS[i], "markersize": 3.5} if len(values) <= 30 else {}
                if smooth is not None:
                    axes.plot(steps, values, color=PALETTE[variable], linewidth=0.7, alpha=0.35)
                line = values if smooth is None else smooth
                axes.plot(
                    steps, line, color=PALETTE[variable], linestyle=LINES[(0, 2, 3, 1, 5, 6)[i]], label=label, **few
                )
            axes.set_title(METRICS[metric], loc="left", color=PALETTE["--ink"])
            axes.set_xlabel("step")
            if metric in ("success", "clip_fraction"):
                axes.set_ylim(bottom=0)
        for axes in grid.flat[len(metrics) :]:
            axes.set_visible(False)
        if len(runs) > 1:
            figure.legend(loc="outside lower center", ncols=3)
        return as_svg(figure, f"Training curves of {stage}: {', '.join(METRICS[metric] for metric in metrics)}")


def _smooth(values: np.ndarray) -> np.ndarray | None:
    """Return the centred running mean over a twentieth of the curve, or None for fewer than 60 values."""
    if len(values) < 60:
        return None
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start, stop = (np.clip(np.arange(len(values)) + shift, 0, len(values)) for shift in (-half, half + 1))
    smoothed: np.ndarray = (sums[stop] - sums[start]) / (stop - start)
    return smoothed


def fill(color: str, hatch: str) -> dict[str, Any]:
    """Style of a bar: solid, or hatched and unfilled (background-coloured hatches would not adapt to dark pages)."""
    return {"facecolor": "none" if hatch else color, "edgecolor": color, "hatch": hatch or None, "linewidth": 0.9}


def as_svg(figure: Figure, label: str) -> str:
    """Return a scalable <svg> element that uses the page's font and colours and has ``label`` as its aria-label."""
    stream = io.StringIO()
    # The salt makes the ids of clip paths and hatches unique among the charts of a page.
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to groups, and every chart has an axes_1
    width = figure.get_figwidth()
    # The minimum width keeps text readable: the page scrolls a wide chart instead of shrinking it further.
    scale = f'style="max-width: {width * 7:.1f}rem; min-width: {width * 4.4:.1f}rem"'
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([^;'\"]*)'[^;\"]*", r"font: \1 var(--sans)", svg)
    for variable, color in PALETTE.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" {scale} ', 1)


def standalone(svg: str) -> str:
    """Convert an SVG of ``as_svg`` to a separate file: light colours, a background, natural size."""
    svg = svg.replace("var(--sans)", "sans-serif")
    for variable, color in PALETTE.items():
        svg = svg.replace(f"var({variable})", color)
    svg = re.sub(r' style="max-width: [^"]*"', "", svg, count=1)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    width, height = box.groups()
    background = f'<rect width="{width}" height="{height}" fill="{PALETTE["--card"]}"/>'
    svg = svg.replace("<svg ", f'<svg width="{width}pt" height="{height}pt" ', 1)
    return re.sub(r"(<svg [^>]*>)", rf"\1\n {background}", svg, count=1)


def table_picture(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path, strong: int | None = None) -> None:
    """Save a table as a picture for a README; row ``strong`` is highlighted."""
    lengths = [max(len(cell) for cell in column) + 3 for column in zip(header, *rows, strict=True)]
    right = np.cumsum(lengths) / sum(lengths)
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure((0.095 * sum(lengths), 0.36 * (len(rows) + 1) + 0.1), dpi=180, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 1), ylim=(len(rows) + 1.1, -0.1))
        axes.axis("off")
        for y, cells in enumerate([header, *rows]):
            emphasised = strong is not None and y == strong + 1
            if emphasised:
                axes.axhspan(y, y + 1, color="#e6edff", linewidth=0)
            axes.axhline(
                y + 1, color=PALETTE["--muted"] if y == 0 else PALETTE["--line"], linewidth=1.0 if y == 0 else 0.6
            )
            for x, cell in enumerate(cells):
                place = {"x": 0.012, "ha": "left"} if x == 0 else {"x": right[x] - 0.012, "ha": "right"}
                axes.text(
                    y=y + 0.52, s=cell, va="center", color=PALETTE["--muted" if y == 0 else "--ink"],
                    weight="bold" if emphasised or y == 0 else "normal", **place,
                )  # fmt: skip
        figure.savefig(path)
