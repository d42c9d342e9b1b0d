"""Draws a sensitivity report: a heat map of every tower, and bars for the layers outside the towers."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from rlrc.compressor.prune.sensitivity_report import SensitivityReport

Cells = dict[str, dict[int, float]]  # by row of a map, the errors by block
LEAST = 1e-6  # the smallest error on the logarithmic scale


def draw(report: SensitivityReport, file: Path) -> None:
    """Writes an SVG."""
    towers, others = tabulate(report)
    rows = [len(cells) for cells in towers.values()] + ([0.4 * len(others) + 0.6] if others else [])
    widest = max((1 + max(cell) for cells in towers.values() for cell in cells.values()), default=12)
    errors = [max(row.error, LEAST) for row in report.modules]
    scale = LogNorm(min(errors), max(*errors, 2 * min(errors)))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sensitivity", "font.size": 8}):
        figure = Figure((max(6.0, 2.4 + 0.36 * widest), 1 + 0.42 * sum(rows) + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
        for each, (tower, cells) in zip(axes, towers.items(), strict=False):
            mesh = _map(each, tower, cells, scale)
            figure.colorbar(mesh, ax=each, label="change")
        if others:
            _bars(axes[-1], others, report.bits)
        figure.suptitle("Change of the normalised actions by one module alone", fontsize=9)
        figure.savefig(file, format="svg", metadata={"Date": None})


def tabulate(report: SensitivityReport) -> tuple[dict[str, Cells], dict[str, float]]:
    """The rows of every tower, and the errors of the layers outside the blocks."""
    towers: dict[str, Cells] = {}
    others: dict[str, float] = {}
    names = {"prune": f"{report.ratio:.0%} pruned", "quantize": f"{report.bits} bits", "drop": "dropped"}
    for row in report.modules:
        tower, *rest = row.module.split(".")
        if rest[:1] != ["layers"]:
            others[row.module] = row.error
            continue
        label = " ".join([names[row.kind], *rest[2:]])
        towers.setdefault(tower, {}).setdefault(label, {})[int(rest[1])] = row.error
    return towers, others


def _map(axes: Axes, tower: str, cells: Cells, scale: LogNorm) -> QuadMesh:
    blocks = 1 + max(max(cell) for cell in cells.values())
    values = np.full((len(cells), blocks), np.nan)
    for row, cell in enumerate(cells.values()):
        for block, error in cell.items():
            values[row, block] = max(error, LEAST)
    mesh = axes.pcolormesh(values, norm=scale, cmap="cividis", edgecolors="white", linewidth=0.8)
    axes.set(title=tower, xlabel="block", xticks=np.arange(blocks) + 0.5, yticks=np.arange(len(cells)) + 0.5)
    axes.set_xticklabels([str(i) for i in range(blocks)])
    axes.set_yticklabels(list(cells))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    return mesh


def _bars(axes: Axes, others: dict[str, float], bits: int) -> None:
    axes.barh(list(others), list(others.values()), color="#2457d6", height=0.6)
    axes.set(title=f"{bits} bits, outside the blocks", xlabel="change")
    axes.invert_yaxis()
