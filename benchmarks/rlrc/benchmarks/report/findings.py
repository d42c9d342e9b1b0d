"""The report's sections that set policies against each other: claims, trade-offs, recovery, other runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlrc.benchmarks.claims.claims import ClaimCheck, figure
from rlrc.benchmarks.report import tradeoffs
from rlrc.benchmarks.report.document import (
    DASH,
    Block,
    Cell,
    Chart,
    Heading,
    Listing,
    Note,
    ReportTable,
    Terms,
    megabytes,
    millions,
    milliseconds,
)
from rlrc.benchmarks.report.tradeoffs import RecoveryCurve
from rlrc.benchmarks.results.results import GEOMETRY, GEOMETRY_POLICIES, PEERS, SEPARATE_KINDS, STUDY, merge
from rlrc.benchmarks.results.stats import Estimate, percentile_interval, wilson

Row = Mapping[str, Any]
SCARCE = "few-"  # how the study's arms with one demonstration a task begin


# Claims


def claims(results: Sequence[Row]) -> list[Block]:
    """Every claim that was checked in one table, then what each verdict holds for."""
    checked = [result for result in results if result.get("kind") in ("claims", GEOMETRY)]
    if not checked:
        return []
    header = ("policy", "verdict", "dense", "compressed", "memory", "latency", "success")
    blocks: list[Block] = [ReportTable(header, [_summary(result) for result in checked])]
    if any(result["kind"] == GEOMETRY for result in checked):
        blocks.append(
            Note("Real sizes have random weights: latency and memory do not depend on them, success means nothing.")
        )
    for result in checked:
        blocks += [Heading(title_of(result)), _checks(result)]
        blocks.append(Terms(_operating_point(result), "operating point"))
    return blocks


def title_of(result: Row) -> str:
    if result["kind"] == GEOMETRY:
        return f"{result['geometry']} on {result['runtime']}"
    return str(result["operating_point"]["compressed"]["name"])


def _summary(result: Row) -> list[Cell]:
    checks = {check["claim"]: ClaimCheck(**check) for check in result["checks"]}

    def ratio(claim: str) -> Cell:
        check = checks.get(claim)
        if check is None or check.value is None:
            return Cell("not measured")
        below = f"{figure(check, check.limit)} or more" if check.limit is not None else ""
        return Cell(figure(check, check.value), below)

    return [
        Cell(title_of(result)),
        Cell(result["verdict"], verdict=True),
        *(_operand(result, which) for which in GEOMETRY_POLICIES[:2]),
        *(ratio(claim) for claim in ("memory", "latency", "success")),
    ]


def _operand(result: Row, which: str) -> Cell:
    if result["kind"] == GEOMETRY:
        row = result[which]
    else:
        point = result["operating_point"]["baseline" if which == "dense" else "compressed"]
        row = next(row for row in result["rows"] if row["name"] == point["name"])
    return Cell(f"{megabytes(row['bytes'])}, {milliseconds(row['latency_ms']['p50'])}", row["precision"])


def _checks(result: Row) -> ReportTable:
    checks = [ClaimCheck(**check) for check in result["checks"]]
    rows = [
        [
            Cell(check.claim),
            Cell(check.verdict, verdict=True),
            *(Cell(figure(check, number)) for number in (check.value, check.limit, check.threshold)),
            Cell(check.reason),
        ]
        for check in checks
    ]
    return ReportTable(("claim", "verdict", "measured", "lower limit", "needed", ""), rows, words=True)


def _operating_point(result: Row) -> dict[str, object]:
    machine = result.get("machine") or {}
    if result["kind"] == GEOMETRY:
        told: dict[str, object] = {
            which: f"{row['precision']}, {millions(row.get('parameters'))} parameters, "
            f"peak of the process {megabytes(row.get('peak_rss'))}"
            for which in GEOMETRY_POLICIES
            if (row := result.get(which))
        }
        cut = result.get("pruned") or {}
    else:
        point = result["operating_point"]
        told = {which: _label(point[which]) for which in ("compressed", "baseline")}
        told |= {"quantization": _quantization(point["quantization"])}
        told |= {"stages": " \u2192 ".join(point["stages"]) or DASH}
        cut = point["pruned"]
    told["cut by pruning"] = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in cut.items())
    told["threads"] = result.get("threads", machine.get("threads"))
    told["machine"] = machine.get("cpu")
    told["versions"] = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
    return {key: value for key, value in told.items() if value}


def _label(row: Row) -> str:
    size = f"{millions(row['parameters'])} parameters, {megabytes(row['bytes'])} ({row['counting']})"
    return f"{row['name']}: graphs in {row['precision']}, {size}"


def _quantization(quantization: Row | None) -> str:
    if not quantization:
        return "none"
    tensors = ", ".join(f"{count} tensors at {bits} bits" for bits, count in quantization["tensors"].items())
    return f"{quantization['grid']}, groups of {quantization['group']}; {tensors}"


# Trade-offs


def pareto(results: Sequence[Row]) -> list[Block]:
    """Every policy with bytes, latency and success; the study's in a chart of their own, for another run's times."""
    blocks: list[Block] = []
    own = merge([result for result in results if result.get("kind") not in SEPARATE_KINDS])
    studied = [arm for result in results if result.get("kind") == STUDY for arm in pooled(result["rows"])]
    for name, rows, caption in (
        (
            "pareto",
            own,
            "Filled: no other policy here is better in one of bytes, latency and success, and worse in none.",
        ),
        (
            "pareto-recovery",
            studied,
            "The same of the recovery study's policies, all seeds together; times of its own run.",
        ),
    ):
        complete = [
            row for row in rows if row.get("bytes") and row.get("latency_ms") and row.get("success") is not None
        ]
        if len(complete) > 1:
            medians = {row["name"]: median(row) for row in complete}
            blocks.append(Chart(name, tradeoffs.pareto(complete, medians), caption))
    return blocks


def median(row: Row) -> Estimate:
    """Milliseconds, with limits where the trials are there."""
    trials, block = row.get("trials_ms") or [], row.get("block", 1)
    rounds = [trials[i : i + block] for i in range(0, len(trials), block)]
    value = row["latency_ms"]["p50"]
    return percentile_interval(rounds, 50) if len(rounds) > 1 else Estimate(value, value, value)


def pooled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The study's arms, the episodes of all seeds together."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = [row for row in rows if row["name"] == name]
        episodes = sum(row["episodes"] for row in seeds)
        solved = sum(round(row["success"] * row["episodes"]) for row in seeds)
        pool = {"success": solved / episodes, "episodes": episodes, "interval": list(wilson(solved, episodes))}
        found.append({**seeds[0], **pool})
    return found


def resources(results: Sequence[Row], rows: Sequence[Row]) -> list[Block]:
    """Of every policy whose throughput or energy was asked for; where there was no way to measure energy, why."""
    blocks: list[Block] = []
    found = [
        [
            Cell(row["name"] if not i else ""),
            Cell(number),
            Cell(f"{one['chunks_per_s']:.2f}", f"{one['interval'][0]:.2f} to {one['interval'][1]:.2f}"),
            Cell(f"{one['actions_per_s']:.1f}"),
            Cell(f"{one['cpu_s_per_chunk'] * 1e3:.2f} ms"),
        ]
        for row in rows
        for i, (number, one) in enumerate((row.get("throughput") or {}).items())
    ]
    if found:
        blocks.append(
            ReportTable(("policy", "at once", "chunks a second", "actions a second", "CPU time a chunk"), found)
        )
    spent = [row for row in rows if row.get("energy")]
    if spent:
        heads = ("policy", "joules a chunk", "an action", "a chunk above idle", "watts", "idle")
        blocks.append(ReportTable(heads, [_energy(row) for row in spent]))
    sources = dict.fromkeys(str(result["source"]) for result in results if result.get("kind") == "energy")
    return blocks + [Note(f"Energy: {source}.") for source in sources]


def _energy(row: Row) -> list[Cell]:
    energy = row["energy"]
    joules = [energy[key] for key in ("joules_chunk", "joules_action", "joules_chunk_above_idle")]
    told = [Cell(f"{one['value']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}") for one in joules]
    return [Cell(row["name"]), *told, Cell(f"{energy['watts']:.2f}"), Cell(f"{energy['idle_watts']:.2f}")]


# Recovery


def recovery(results: Sequence[Row]) -> list[Block]:
    rows = [row for result in results if result.get("kind") == STUDY for row in result["rows"]]
    if not rows:
        return []
    trained = [row for row in rows if row["recovery"] and row["quantization"] == rows[0]["quantization"]]
    panels = {
        title: arms(some)
        for title, scarce in (("experts can be asked", False), ("one demonstration a task", True))
        if (some := [row for row in trained if row["name"].startswith(SCARCE) == scarce])
    }
    levels = {row["name"]: row["success"] for row in rows if row["name"] in ("dense", "pruned")}
    caption = "A point a seed; lines: episodes that PPO sampled on its way, which are not those of the evaluation."
    return [Chart("recovery", tradeoffs.recovery(panels, levels), caption)]


def arms(rows: Sequence[Row]) -> list[RecoveryCurve]:
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = [row for row in rows if row["name"] == name]
        points = [(row["cpu_minutes"], row["success"], *row["interval"]) for row in seeds]
        ways = [[(at["cpu_minutes"], at["sampled_success"]) for at in row["curve"]] for row in seeds if row["curve"]]
        found.append(RecoveryCurve(name, points, ways))
    return found


# Other runtimes


def peers(results: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = []
    for result in results:
        if result.get("kind") != PEERS:
            continue
        measured = [row for row in result["rows"] if not row.get("skipped")]
        ratios = {name: Estimate(*values) for name, values in result["ratios"].items()}
        caption = f"{result['policy']}: latency in multiples of {result['ours']}, all in turns in one run."
        if result.get("wanted"):
            caption += f" Dashed: {result['wanted']:g}x, what was set out for."
        spent = {name: Estimate(*values) for name, values in (result.get("cpu_ratios") or {}).items()}
        load = f"Load of the machine: {min(result['load'])} to {max(result['load'])}." if result.get("load") else ""
        against = f"of {result['ours']}'s"
        header = ("runtime", "precision", "p50", "p90", against, "CPU time", "peak memory", "largest difference")
        blocks += [
            Heading(str(result["policy"])),
            ReportTable(header, [_peer(row, ratios, spent) for row in measured]),
            Note(f"{result['note']} {load}".strip()),
            Chart(f"peers-{result['name']}", tradeoffs.ratios(ratios, result.get("wanted")), caption),
        ]
        left_out = [f"{row['name']}: {row['skipped']}" for row in result["rows"] if row.get("skipped")]
        blocks += [Listing(left_out, "not measured")] if left_out else []
    return blocks


def _peer(row: Row, ratios: Mapping[str, Estimate], spent: Mapping[str, Estimate]) -> list[Cell]:
    def against(found: Mapping[str, Estimate]) -> Cell:
        ratio = found.get(row["name"])
        return Cell(f"{ratio.value:.2f}x", f"{ratio.low:.2f} to {ratio.high:.2f}") if ratio else Cell("1")

    difference = row.get("action_difference")
    return [
        Cell(row["name"], row.get("version", "")),
        Cell(row["precision"]),
        *(Cell(milliseconds(row["latency_ms"][which])) for which in ("p50", "p90")),
        against(ratios),
        against(spent) if spent else Cell(DASH),
        Cell(megabytes(row.get("peak_rss"))),
        Cell(DASH if difference is None else f"{difference:.2g}"),
    ]
