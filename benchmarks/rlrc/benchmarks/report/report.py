"""Result files, training curves and film strips as one report: an HTML page that needs nothing else, or Markdown.

Sections without data are left out. What compares whole runs with each other is in rlrc.benchmarks.report.findings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc.benchmarks.report import charts, findings, limits, tradeoffs
from rlrc.benchmarks.report.document import (
    DASH,
    Block,
    Cell,
    Chart,
    Charts,
    CommandLine,
    Document,
    FilmStrip,
    Heading,
    Note,
    ReportTable,
    Section,
    Terms,
    Tiles,
    cells,
    megabytes,
    millions,
    milliseconds,
)
from rlrc.benchmarks.report.film import Strip
from rlrc.benchmarks.results.results import BASELINE, SEPARATE_KINDS, merge
from rlrc.errors import UserError

HERO = "compressed"
HEADER = ("policy", "parameters", "memory", "p50", "p99", "success", "hard tasks", "CPU min")
LEGEND = (
    "Memory is everything the runtime loads: graphs with all weights, vision included, and the tokenizer. A policy "
    "that is not quantized counts as bf16, 2 bytes a parameter, however its graphs are stored. p50 and p99: time of an "
    "inference, observation in to actions out. Under a success rate, in percent: its 95 % Wilson interval. Hard "
    "tasks are all but the closing ones, which survive any pruning. CPU min: processor time since pruning, or of the "
    "whole training where nothing was pruned."
)
# DAgger's rounds are part of fine-tuning and are drawn with it.
STAGES = {"dagger": "sft", "ppo": "rl"}
TITLES = {"sft": "Supervised fine-tuning", "rl": "Reinforcement learning (PPO)"}
BARS = 5  # bars a task that can be told apart

Curve = Sequence[tuple[float, float]]  # (step, value)
Runs = Mapping[str, Mapping[str, Mapping[str, Curve]]]  # stage -> run -> metric
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Film:
    strips: Sequence[Strip]
    task: str
    caption: str


def document(
    results: Sequence[Row], curves: Runs | None = None, film: Film | None = None, predicted: Sequence[str] = ()
) -> Document:
    """``predicted``: geometries to predict for the devices of `rlrc jetson devices`."""
    own = [result for result in results if result.get("kind") not in SEPARATE_KINDS]
    rows = merge(own)
    comparisons = [pair for result in own for pair in result.get("comparisons", ())]
    sections = [
        Section("", _tiles(rows)),
        Section("Claims, all at one operating point", findings.claims(results)),
        Section("Results", _table(rows)),
        Section("Memory", _memory(rows)),
        Section("Latency", _latency(rows)),
        Section("Throughput and energy", findings.resources(own, rows)),
        Section("What the machine allows", limits.rooflines(results)),
        Section("Bytes, time and success", findings.pareto(results)),
        Section("Success", _success(rows, comparisons)),
        Section("Recovery", findings.recovery(results)),
        *(Section(TITLES.get(stage, stage), [_curves(stage, runs)]) for stage, runs in (curves or {}).items()),
        Section("What one would use instead", findings.peers(results)),
        Section("Other devices, predicted", limits.predictions(predicted)),
        Section("Before and after recovery", _film(film) if film else []),
        Section("How it was measured", _provenance(results)),
    ]
    return Document(
        "Compressed and recovered policies, measured",
        "Every figure was measured by a command that is given at the end, on the machine named there, but for those "
        "that are called predicted. Intervals are at 95 %.",
        sections,
    )


def table(rows: Sequence[Row]) -> list[list[tuple[str, str]]]:
    """Cells of HEADER's columns: (figure, what stands under it). Ratios are against the row "dense", or the first."""
    baseline = next((row for row in rows if row["name"] == BASELINE), rows[0])

    def ratio(row: Row, value: Any, base: Any, better: str) -> str:
        told = f"{base / value:.1f}" if row is not baseline and value and base else "1.0"
        return "" if told == "1.0" else f"{told}x {better}"

    def latency(row: Row, which: str) -> Any:
        return row.get("latency_ms", {}).get(which)

    return [
        [
            (row["name"], row.get("precision", "")),
            (millions(row.get("parameters")), ratio(row, row.get("parameters"), baseline.get("parameters"), "fewer")),
            (megabytes(row.get("bytes")), ratio(row, row.get("bytes"), baseline.get("bytes"), "less")),
            (milliseconds(latency(row, "p50")), ratio(row, latency(row, "p50"), latency(baseline, "p50"), "faster")),
            (milliseconds(latency(row, "p99")), ""),
            _rate(row),
            _rate(row.get("hard", {})),
            (f"{row['cpu_minutes']:.1f}" if row.get("cpu_minutes") is not None else DASH, ""),
        ]
        for row in rows
    ]


def table_picture(results: Sequence[Row], path: Path) -> None:
    """The table as a picture, for a README."""
    rows = merge([result for result in results if result.get("kind") not in SEPARATE_KINDS])
    texts = [
        [f"{text} ({below})" if below and i else text for i, (text, below) in enumerate(row)] for row in table(rows)
    ]
    names = [row["name"] for row in rows]
    charts.table_picture(HEADER, texts, path, strong=names.index(HERO) if HERO in names else None)


def read_curves(arguments: Sequence[str]) -> dict[str, dict[str, dict[str, list[tuple[float, float]]]]]:
    """``FILE.jsonl`` or ``NAME=FILE.jsonl`` -> stage -> run -> metric -> (step, value). Raises UserError for no curve.

    A step that is logged twice (by a run that was resumed) counts once, as logged last.
    """
    found: dict[str, dict[str, dict[str, dict[float, float]]]] = {}
    for argument in arguments:
        name, _, file = argument.rpartition("=") if not Path(argument).exists() else ("", "", argument)
        path = Path(file)
        name = name or (path.parent.name if path.stem == "curve" else path.stem)
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            entries = [(STAGES.get(line["stage"], str(line["stage"])), float(line["step"]), line) for line in lines]
        except OSError as error:
            raise UserError(f"expected training curves in {path}, found: {error.strerror}; check the path") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'expected lines {{"stage", "step", ...}} in {path}, found something else; pass the curves of a run'
            ) from None
        for stage, step, line in entries:
            for metric in charts.METRICS:
                if isinstance(line.get(metric), (int, float)):
                    run = found.setdefault(stage, {}).setdefault(name, {})
                    run.setdefault(metric, {})[step] = float(line[metric])
    return {
        stage: {name: {metric: sorted(points.items()) for metric, points in run.items()} for name, run in runs.items()}
        for stage, runs in found.items()
    }


def _tiles(rows: Sequence[Row]) -> list[Block]:
    by_name = {row["name"]: row for row in rows}
    if BASELINE not in by_name or HERO not in by_name:
        return []
    dense, hero = by_name[BASELINE], by_name[HERO]
    tiles = []
    if dense.get("bytes") and hero.get("bytes"):
        sizes = f"{megabytes(dense['bytes'])} to {megabytes(hero['bytes'])}"
        tiles.append((f"{dense['bytes'] / hero['bytes']:.1f}x", f"less memory: {sizes}"))
    if "latency_ms" in dense and "latency_ms" in hero:
        before, after = dense["latency_ms"]["p50"], hero["latency_ms"]["p50"]
        tiles.append((f"{before / after:.1f}x", f"faster: {milliseconds(before)} to {milliseconds(after)}"))
    if dense.get("success") is not None and hero.get("success") is not None:
        tiles.append(
            (f"{hero['success']:.1%}", f"success in {hero['episodes']} episodes; dense {dense['success']:.1%}")
        )
    return [Tiles(tiles)]


def _table(rows: Sequence[Row]) -> list[Block]:
    if not rows:
        return []
    names = [row["name"] for row in rows]
    filled = [[Cell(*pair) for pair in row] for row in table(rows)]
    return [ReportTable(HEADER, filled, names.index(HERO) if HERO in names else None), Note(LEGEND)]


def _memory(rows: Sequence[Row]) -> list[Block]:
    sized = [row for row in rows if row.get("bytes")]
    if not sized:
        return []
    caption = "Bytes that the runtime loads; a policy that is not quantized counts as bf16."
    if any(row.get("memory") for row in sized):
        caption += (
            " Below, hatched: proportional set size of a fresh process, beyond one that has imported the runtime; "
            "the whisker is the range of its runs, the mark the peak."
        )
    return [Chart("memory", tradeoffs.memory(sized), caption)]


def _latency(rows: Sequence[Row]) -> list[Block]:
    trials = {row["name"]: row["trials_ms"] for row in rows if row.get("trials_ms")}
    parts = {row["name"]: row["parts_ms"] for row in rows if row.get("parts_ms")}
    drawn = []
    if trials:
        counts = " or ".join(str(count) for count in sorted({len(values) for values in trials.values()}))
        caption = f"Every trial, {counts} a policy. The marks are the median and the 99th percentile."
        drawn.append(Chart("latency", charts.latency(trials), caption))
    if parts:
        medians = {name: {part: values["p50"] for part, values in row.items()} for name, row in parts.items()}
        drawn.append(Chart("parts", charts.parts(medians), "Where the time of an inference goes."))
    return [Charts(drawn)] if drawn else []


def _success(rows: Sequence[Row], comparisons: Sequence[Row]) -> list[Block]:
    played = [row for row in rows if row.get("per_task")]
    if not played:
        return []
    shown = sorted(played, key=lambda row: row["name"] not in charts.STAGES)[:BARS]
    hidden = [row["name"] for row in played if row not in shown]
    left_out = f" In the table only: {', '.join(hidden)}." if hidden else ""
    blocks: list[Block] = [Chart("success", charts.success(shown), f"Closed-loop episodes, argmax decoding.{left_out}")]
    if comparisons:
        header = ("policy", "against", "scenes", "only it", "only the other", "difference", "lower limit", "McNemar p")
        compared = [
            cells(
                [
                    *(str(pair[key]) for key in ("name", "baseline", "pairs", "only", "only_baseline")),
                    *(f"{pair[key]:+.3f}" for key in ("difference", "lower_limit")),
                    f"{pair['mcnemar_p']:.3f}",
                ]
            )
            for pair in comparisons
        ]
        text = (
            "The same scenes were given to both; the columns in the middle count those that only one of them solved. "
            "The lower limit of the difference is one-sided, at 95 %."
        )
        blocks += [Heading("Scene by scene"), ReportTable(header, compared), Note(text)]
    return blocks


def _curves(stage: str, runs: Mapping[str, Mapping[str, Curve]]) -> Chart:
    drawn = charts.curves(TITLES.get(stage, stage), runs)
    return Chart(
        f"curves-{stage}", drawn, "Thin lines: as logged. Thick lines: running mean over a twentieth of the run."
    )


def _film(film: Film) -> list[Block]:
    blocks: list[Block] = []
    for strip in film.strips:
        episode = strip.episode
        outcome = f"success after {episode.steps} steps" if episode.success else f"no success in {episode.steps} steps"
        pictures = [
            (frame, f"{strip.name} at step {step}", str(step))
            for frame, step in zip(strip.frames, strip.steps, strict=True)
        ]
        blocks += [Heading(f"{strip.name}: {outcome}"), FilmStrip(pictures)]
    return [*blocks, Note(f"{film.task}, {film.caption}. Under each picture: the control step.")]


def _provenance(results: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = []
    for result in results:
        blocks += [Heading(str(result.get("kind", "results"))), CommandLine(str(result.get("command")))]
        machine = result.get("machine") or {}
        facts = {key.replace("_", " "): value for key, value in machine.items() if value is not None}
        facts |= facts.pop("versions", {})
        details = Terms(facts, "machine and versions")
        if facts and details not in blocks:
            blocks.append(details)
    return blocks


def _rate(row: Row) -> tuple[str, str]:
    if row.get("success") is None:
        return DASH, ""
    low, high = row["interval"]
    return f"{row['success']:.1%}", f"{low * 100:.1f} to {high * 100:.1f}"
