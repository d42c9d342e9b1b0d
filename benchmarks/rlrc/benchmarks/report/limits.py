"""The report's sections on hardware limits: rooflines of this machine and predictions for other devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrc.artifact import geometries
from rlrc.artifact.precisions import PRECISIONS
from rlrc.benchmarks.report import tradeoffs
from rlrc.benchmarks.report.document import (
    DASH,
    Block,
    Cell,
    Chart,
    Listing,
    Note,
    ReportTable,
    megabytes,
    milliseconds,
)
from rlrc.benchmarks.report.findings import title_of
from rlrc.benchmarks.report.tradeoffs import RooflinePoint
from rlrc.benchmarks.results.results import GEOMETRY, GEOMETRY_POLICIES
from rlrc.benchmarks.results.stats import Estimate
from rlrc.jetson.model import devices
from rlrc.jetson.model.plan import Setting, of_geometry, plan, prune
from rlrc.jetson.model.work import Load, Part, work

Row = Mapping[str, Any]
PRUNED = 0.9  # share of heads and channels removed, in compressed and predicted policies


# What the machine allows

ACTIVATION = 4  # bytes: every runtime here keeps activations in float32
GRAPHS = {"vision": "vision", "prefix": "prefix", "steps": "step"}


def rooflines(results: Sequence[Row]) -> list[Block]:
    """Draw a chart for every geometry with a measured roofline."""
    blocks: list[Block] = []
    for result in results:
        if result.get("kind") != GEOMETRY or not result.get("roofline"):
            continue
        points = [point for which in GEOMETRY_POLICIES if result.get(which) for point in points_of(result, which)]
        peaks = result["roofline"]
        svg = tradeoffs.roofline(peaks["read_gb_s"], peaks["products_gop_s"], points)
        caption = (
            f"{title_of(result)}: attained performance of each part of an inference; whiskers reach down to the 90th "
            "percentile of its time. Lines: bandwidth and peak operations measured in the same run."
        )
        blocks += [Chart(f"roofline-{result['geometry']}-{result['runtime']}", svg, caption), _shares(result)]
    return blocks


def points_of(result: Row, which: str) -> list[RooflinePoint]:
    """Combine operation counts of the geometry with measured times."""
    row = result[which]
    geometry = geometries.geometry(str(result["geometry"]))
    towers = geometry.towers
    if which == "compressed":
        cpu = devices.Device(devices.CPU, "", "", None, {}, 1.0, 0, None)
        dense = Setting("", geometry.policy, towers, PRECISIONS["bf16"], cpu)
        towers = prune(dense, PRUNED).towers
    parts = {
        part.name: part
        for part in work(geometry.policy, towers, Load(prompt_tokens=result.get("instruction_tokens"))).parts
    }
    points = []
    for name, times in row["parts_ms"].items():
        if name in parts:
            operations = parts[name].flops
            median, slow = operations / times["p50"] / 1e6, operations / times["p90"] / 1e6
            intensity = operations / bytes_moved(parts[name], bits(result, which, name))
            points.append(
                RooflinePoint(f"{which}, {row['precision']}", name, intensity, Estimate(median, slow, median))
            )
    return points


def bytes_moved(part: Part, width: float) -> float:
    """Bytes that a part reads and writes over all its passes; ``width``: bits per weight."""
    return part.times * sum(op.weights * width / 8 + op.activations * ACTIVATION for op in part.ops)


def bits(result: Row, which: str, part: str) -> float:
    """Bits per weight in the graph of a part. ``precision`` names one precision for all graphs, or one per graph."""
    if which == "torch":
        return 16.0
    precision = str(result[which]["precision"])
    graph = GRAPHS.get(part, "decoder")
    each = dict(word.split(" ", 1) for word in precision.split(", ")) if " " in precision else {}
    name = each.get(graph, precision)
    if result["runtime"] == "gguf" and graph == "decoder" and name == "fp16":
        return 16.0  # llama.cpp reads fp16 weights without conversion
    return PRECISIONS[name].in_memory if name in PRECISIONS else 32.0


def _shares(result: Row) -> ReportTable:
    rows = [
        [
            Cell(f"{which}, {result[which]['precision']}"),
            Cell(part),
            Cell(f"{times['measured_ms']:,.1f}"),
            Cell(f"{times['limit_ms']:,.1f}"),
            Cell(f"{times['share']:.0%}"),
            Cell(times["bound"]),
        ]
        for which in GEOMETRY_POLICIES
        for part, times in (result.get(which) or {}).get("roofline", {}).items()
    ]
    return ReportTable(("policy", "part", "ms", "limit, ms", "share", "bound by"), rows)


# Devices


@dataclass(frozen=True)
class Kind:
    title: str
    precision: str
    pruned: float


KINDS = (Kind("dense, bf16", "bf16", 0.0), Kind("pruned 90 %, int4", "int4", PRUNED))


def predictions(names: Sequence[str]) -> list[Block]:
    """Predict these geometries on every module in its fastest power mode, as `rlrc jetson plan` does."""
    if not names:
        return []
    panels: dict[str, dict[str, dict[str, Estimate]]] = {}
    rows, assumed = [], dict[str, None]()
    for name in names:
        for kind in KINDS:
            for module in devices.table().devices:
                setting = of_geometry(name, kind.precision, devices.device(module), Load(), None)
                planned = plan(prune(setting, kind.pruned) if kind.pruned else setting)
                predicted, memory = planned.prediction, planned.prediction.memory
                estimate = Estimate(predicted.latency_ms, *predicted.bounds)
                panels.setdefault(name, {}).setdefault(kind.title, {})[module] = estimate
                fits = "fits" if memory.fits else f"{megabytes(memory.excess)} over"
                energy = DASH if predicted.joules is None else f"{predicted.joules:.2f} J"
                limits = f"{milliseconds(estimate.low)} to {milliseconds(estimate.high)}"
                values = (milliseconds(estimate.value), limits, megabytes(memory.peak), fits, energy)
                rows.append(
                    [Cell(name), Cell(kind.title), Cell(f"{module}, {setting.device.mode}"), *map(Cell, values)]
                )
                assumed |= dict.fromkeys(planned.assumptions)
    header = ("policy", "kind", "device", "latency", "compiled to plain kernels", "peak memory", "", "energy per chunk")
    caption = "Predicted, not measured. The whiskers reach from compiled to plain kernels."
    text = (
        "Predicted by rlrc jetson plan; docs/jetson.md lists its errors against 34 published measurements. The success "
        "rate of the pruned policies is not predicted."
    )
    return [
        Chart("predictions", tradeoffs.predictions(panels), caption),
        Note(text),
        ReportTable(header, rows, folded="all predictions"),
        Listing(list(assumed), "all assumptions"),
    ]
