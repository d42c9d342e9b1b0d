"""Result files, training curves and film strips as one report. Sections without data are omitted."""

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
    "Memory is everything the runtime loads: graphs with all weights, including vision, and the tokenizer. A policy "
    "that is not quantized counts as bf16, 2 bytes per parameter, regardless of how its graphs are stored. p50 and "
    "p99: time of an inference from observation to actions. Under a success rate: its 95 % Wilson interval in percent. "
    "Hard tasks are all except the closing tasks, which succeed after any pruning. CPU min: processor time since "
    "pruning, or of the whole training of a policy that was not pruned."
)
# DAgger rounds are part of fine-tuning and share its charts.
STAGES = {"dagger": "sft", "ppo": "rl"}
TITLES = {"sft": "Supervised fine-tuning", "rl": "Reinforcement learning (PPO)"}
BARS = 5  # bars per task that remain distinguishable

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
        Section("Claims at one operating point", findings.claims(results)),
        Section("Results", _table(rows)),
        Section("Memory", _memory(rows)),
        Section("Latency", _latency(rows)),
        Section("Throughput and energy", findings.resources(own, rows)),
        Section("Machine limits", limits.rooflines(results)),
        Section("Bytes, time and success", findings.pareto(results)),
        Section("Success", _success(rows, comparisons)),
        Section("Recovery", findings.recovery(results)),
        *(Section(TITLES.get(stage, stage), [_curves(stage, runs)]) for stage, runs in (curves or {}).items()),
        Section("Other runtimes", findings.peers(results)),
        Section("Other devices, predicted", limits.predictions(predicted)),
        Section("Before and after recovery", _film(film) if film else []),
        Section("How it was measured", _provenance(results)),
    ]
    return Document(
        "Measurements of compressed and recovered policies",
        "The commands and machines behind the measured figures are listed at the end. Predicted figures are marked. "
        "Intervals are 95 % intervals.",
        sections,
    )


def table(rows: Sequence[Row]) -> list[list[tuple[str, str]]]:
    """Cells of HEADER's columns: (figure, small print). Ratios compare with the row "dense", or else with the first."""
    baseline = next((row for row in rows if row["name"] == BASELINE), rows[0])

    def ratio(row: Row, value: Any, base: Any, better: str) -> str:
        text = f"{base / value:.1f}" if row is not baseline and value and base else "1.0"
        return "" if text == "1.0" else f"{text}x {better}"

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
    """Save the result table as a picture for a README."""
    rows = merge([result for result in results if result.get("kind") not in SEPARATE_KINDS])
    texts = [
        [f"{text} ({below})" if below and i else text for i, (text, below) in enumerate(row)] for row in table(rows)
    ]
    names = [row["name"] for row in rows]
    charts.table_picture(HEADER, texts, path, strong=names.index(HERO) if HERO in names else None)


def read_curves(arguments: Sequence[str]) -> dict[str, dict[str, dict[str, list[tuple[float, float]]]]]:
    """``FILE.jsonl`` or ``NAME=FILE.jsonl`` -> stage -> run -> metric -> (step, value).

    A resumed run may log a step twice; the last entry counts. Raises UserError for a file that is not a curve.
    """
    curves: dict[str, dict[str, dict[str, dict[float, float]]]] = {}
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
                    run = curves.setdefault(stage, {}).setdefault(name, {})
                    run.setdefault(metric, {})[step] = float(line[metric])
    return {
        stage: {name: {metric: sorted(points.items()) for metric, points in run.items()} for name, run in runs.items()}
        for stage, runs in curves.items()
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
    body = [[Cell(*pair) for pair in row] for row in table(rows)]
    return [ReportTable(HEADER, body, names.index(HERO) if HERO in names else None), Note(LEGEND)]


def _memory(rows: Sequence[Row]) -> list[Block]:
    sized = [row for row in rows if row.get("bytes")]
    if not sized:
        return []
    caption = "Bytes that the runtime loads; a policy that is not quantized counts as bf16."
    if any(row.get("memory") for row in sized):
        caption += (
            " Below, hatched: proportional set size of a fresh process, minus that of a process that has only imported "
            "the runtime; whiskers: range over runs; mark: peak."
        )
    return [Chart("memory", tradeoffs.memory(sized), caption)]


def _latency(rows: Sequence[Row]) -> list[Block]:
    trials = {row["name"]: row["trials_ms"] for row in rows if row.get("trials_ms")}
    parts = {row["name"]: row["parts_ms"] for row in rows if row.get("parts_ms")}
    blocks = []
    if trials:
        counts = " or ".join(str(count) for count in sorted({len(values) for values in trials.values()}))
        caption = f"All trials, {counts} per policy. Marks: median and 99th percentile."
        blocks.append(Chart("latency", charts.latency(trials), caption))
    if parts:
        medians = {name: {part: values["p50"] for part, values in row.items()} for name, row in parts.items()}
        blocks.append(Chart("parts", charts.parts(medians), "Time of each part of an inference."))
    return [Charts(blocks)] if blocks else []


def _success(rows: Sequence[Row], comparisons: Sequence[Row]) -> list[Block]:
    played = [row for row in rows if row.get("per_task")]
    if not played:
        return []
    shown = sorted(played, key=lambda row: row["name"] not in charts.STAGES)[:BARS]
    hidden = [row["name"] for row in played if row not in shown]
    omitted = f" In the table only: {', '.join(hidden)}." if hidden else ""
    blocks: list[Block] = [Chart("success", charts.success(shown), f"Closed-loop episodes, argmax decoding.{omitted}")]
    if comparisons:
        header = (
            "policy", "baseline", "scenes", "policy only", "baseline only", "difference", "lower limit", "McNemar p",
        )  # fmt: skip
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
            "Both policies played the same scenes; the two middle columns count scenes that only one of them solved. "
            "The lower limit of the difference is a one-sided 95 % limit."
        )
        blocks += [Heading("Scene by scene"), ReportTable(header, compared), Note(text)]
    return blocks


def _curves(stage: str, runs: Mapping[str, Mapping[str, Curve]]) -> Chart:
    svg = charts.curves(TITLES.get(stage, stage), runs)
    return Chart(f"curves-{stage}", svg, "Thin lines: logged values. Thick lines: running mean over 5 % of the run.")


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
