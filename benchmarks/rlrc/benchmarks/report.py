"""Result files, training curves and film strips as one HTML page that needs nothing else: no network, no scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlrc.benchmarks import charts
from rlrc.benchmarks.claims import Check, figure
from rlrc.benchmarks.film import Strip
from rlrc.benchmarks.markup import DASH, cell, megabytes, millions, milliseconds, note, picture, section, terms, verdict
from rlrc.benchmarks.markup import figure as chart
from rlrc.benchmarks.markup import table as html_table
from rlrc.benchmarks.results import BASELINE, merge
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


@dataclass(frozen=True)
class Film:
    strips: Sequence[Strip]
    task: str
    caption: str


def page(results: Sequence[Mapping[str, Any]], curves: Runs | None = None, film: Film | None = None) -> str:
    """The whole page. Sections without data are left out."""
    rows = merge(results)
    claims = [result for result in results if result.get("kind") == "claims"]
    comparisons = [pair for result in results for pair in result.get("comparisons", ())]
    sections = [
        _tiles(rows),
        section("Results", _table(rows)),
        *(section("Claims, all at one operating point", _claims(result)) for result in claims),
        section("Latency", _latency(rows)),
        section("Success", _success(rows, comparisons)),
        *(section(TITLES.get(stage, stage), _curves(stage, runs)) for stage, runs in (curves or {}).items()),
        section("Before and after recovery", _film(film) if film else ""),
        section("How it was measured", _provenance(results)),
    ]
    style = (files("rlrc.benchmarks") / "report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rlrc report</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>Compressed and recovered policies, measured</h1>
<p>Every figure was measured by a command that is given at the end of this page. Intervals are at 95 %.</p></header>
{"".join(part for part in sections if part)}
<footer>Written by <code>rlrc report</code>.</footer>
</main>
</body>
</html>
"""


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, str]]]:
    """Cells of HEADER's columns: (figure, what stands under it). Ratios are against the row "dense", or the first."""
    baseline = next((row for row in rows if row["name"] == BASELINE), rows[0])

    def ratio(row: Mapping[str, Any], value: Any, base: Any, better: str) -> str:
        return f"{base / value:.1f}x {better}" if row is not baseline and value and base else ""

    def latency(row: Mapping[str, Any], which: str) -> Any:
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


def table_picture(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The table as a picture, for a README."""
    rows = merge(results)
    cells = [
        [f"{text} ({below})" if below and i else text for i, (text, below) in enumerate(row)] for row in table(rows)
    ]
    names = [row["name"] for row in rows]
    charts.table_picture(HEADER, cells, path, strong=names.index(HERO) if HERO in names else None)


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
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
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


def _tiles(rows: Sequence[Mapping[str, Any]]) -> str:
    by_name = {row["name"]: row for row in rows}
    if BASELINE not in by_name or HERO not in by_name:
        return ""
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
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{a}</b><span>{b}</span></div>" for a, b in tiles)}</div>'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [row["name"] for row in rows]
    cells = [[cell(*pair) for pair in row] for row in table(rows)]
    return html_table(HEADER, cells, strong=names.index(HERO) if HERO in names else None) + note(LEGEND)


def _claims(result: Mapping[str, Any]) -> str:
    checks = [Check(**check) for check in result["checks"]]
    rows = [
        [
            cell(check.claim),
            verdict(check.verdict),
            *(cell(figure(check, number)) for number in (check.value, check.limit, check.threshold)),
            cell(check.reason),
        ]
        for check in checks
    ]
    point = result["operating_point"]
    facts = {
        "compressed": _operand(point["compressed"]),
        "baseline": _operand(point["baseline"]),
        "cut by pruning": ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in point["pruned"].items()),
        "quantization": _quantization(point["quantization"]),
        "stages": " \u2192 ".join(point["stages"]) or DASH,
        "threads": point["threads"],
        "versions": ", ".join(f"{name} {version}" for name, version in point["versions"].items()),
    }
    header = ("claim", "verdict", "measured", "lower limit", "needed", "")
    return html_table(header, rows, words=True) + "<h3>Operating point</h3>" + terms(facts)


def _operand(row: Mapping[str, Any]) -> str:
    size = f"{millions(row['parameters'])} parameters, {megabytes(row['bytes'])} ({row['counting']})"
    return f"{row['name']}: graphs in {row['precision']}, {size}"


def _quantization(quantization: Mapping[str, Any] | None) -> str:
    if not quantization:
        return "none"
    tensors = ", ".join(f"{count} tensors at {bits} bits" for bits, count in quantization["tensors"].items())
    return f"{quantization['grid']}, groups of {quantization['group']}; {tensors}"


def _latency(rows: Sequence[Mapping[str, Any]]) -> str:
    trials = {row["name"]: row["trials_ms"] for row in rows if row.get("trials_ms")}
    parts = {row["name"]: row["parts_ms"] for row in rows if row.get("parts_ms")}
    body = ""
    if trials:
        counts = " or ".join(str(count) for count in sorted({len(values) for values in trials.values()}))
        caption = f"Every trial, {counts} a policy. The marks are the median and the 99th percentile."
        body += chart(charts.latency(trials), caption)
    if parts:
        medians = {name: {part: values["p50"] for part, values in row.items()} for name, row in parts.items()}
        body += chart(charts.parts(medians), "Where the time of an inference goes.")
    return f'<div class="charts">{body}</div>' if body else ""


def _success(rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> str:
    played = [row for row in rows if row.get("per_task")]
    if not played:
        return ""
    shown = sorted(played, key=lambda row: row["name"] not in charts.STAGES)[:BARS]
    hidden = [row["name"] for row in played if row not in shown]
    left_out = f" In the table only: {', '.join(hidden)}." if hidden else ""
    body = chart(charts.success(shown), f"Closed-loop episodes, argmax decoding.{left_out}")
    if comparisons:
        header = ("policy", "against", "scenes", "only it", "only the other", "difference", "lower limit", "McNemar p")
        cells = [
            [
                *(cell(str(pair[key])) for key in ("name", "baseline", "pairs", "only", "only_baseline")),
                *(f"{pair[key]:+.3f}" for key in ("difference", "lower_limit")),
                f"{pair['mcnemar_p']:.3f}",
            ]
            for pair in comparisons
        ]
        text = (
            "The same scenes were given to both; the columns in the middle count those that only one of them solved. "
            "The lower limit of the difference is one-sided, at 95 %."
        )
        body += "<h3>Scene by scene</h3>" + html_table(header, cells) + note(text)
    return body


def _curves(stage: str, runs: Mapping[str, Mapping[str, Curve]]) -> str:
    drawn = charts.curves(TITLES.get(stage, stage), runs)
    return chart(drawn, "Thin lines: as logged. Thick lines: running mean over a twentieth of the run.")


def _film(film: Film) -> str:
    body = ""
    for strip in film.strips:
        episode = strip.episode
        outcome = f"success after {episode.steps} steps" if episode.success else f"no success in {episode.steps} steps"
        frames = (
            picture(frame, f"{strip.name} at step {step}", str(step))
            for frame, step in zip(strip.frames, strip.steps, strict=True)
        )
        body += (
            f"<h3>{cell(f'{strip.name}: {outcome}')}</h3>" + f'<div class="film" tabindex="0">{"".join(frames)}</div>'
        )
    return body + note(f"{film.task}, {film.caption}. Under each picture: the control step.")


def _provenance(results: Sequence[Mapping[str, Any]]) -> str:
    blocks: list[str] = []
    for result in results:
        blocks.append(
            f"<h3>{cell(str(result.get('kind', 'results')))}</h3><pre>{cell(str(result.get('command')))}</pre>"
        )
        machine = result.get("machine") or {}
        facts = {key.replace("_", " "): value for key, value in machine.items() if value is not None}
        facts |= facts.pop("versions", {})
        details = f"<details><summary>machine and versions</summary>{terms(facts)}</details>"
        if facts and details not in blocks:
            blocks.append(details)
    return "\n".join(blocks)


def _rate(row: Mapping[str, Any]) -> tuple[str, str]:
    if row.get("success") is None:
        return DASH, ""
    low, high = row["interval"]
    return f"{row['success']:.1%}", f"{low * 100:.1f} to {high * 100:.1f}"
