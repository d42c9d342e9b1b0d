"""The report's sections that compare policies: claims, trade-offs, recovery, other runtimes."""

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
SCARCE = "few-"  # prefix of the study's arms with one demonstration per task


# Claims


def claims(results: Sequence[Row]) -> list[Block]:
    """Summarise every checked claim in one table, then list the checks and the operating point of each."""
    checked = [result for result in results if result.get("kind") in ("claims", GEOMETRY)]
    if not checked:
        return []
    header = ("policy", "verdict", "dense", "compressed", "memory", "latency", "success")
    blocks: list[Block] = [ReportTable(header, [_summary(result) for result in checked])]
    if any(result["kind"] == GEOMETRY for result in checked):
        blocks.append(
            Note("Policies of real size have random weights: latency and memory are valid, success is meaningless.")
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
        facts: dict[str, object] = {
            which: f"{row['precision']}, {millions(row.get('parameters'))} parameters, "
            f"peak memory of the process {megabytes(row.get('peak_rss'))}"
            for which in GEOMETRY_POLICIES
            if (row := result.get(which))
        }
        cut = result.get("pruned") or {}
    else:
        point = result["operating_point"]
        facts = {which: _label(point[which]) for which in ("compressed", "baseline")}
        facts |= {"quantization": _quantization(point["quantization"])}
        facts |= {"stages": " \u2192 ".join(point["stages"]) or DASH}
        cut = point["pruned"]
    facts["removed by pruning"] = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in cut.items())
    facts["threads"] = result.get("threads", machine.get("threads"))
    facts["machine"] = machine.get("cpu")
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
    return {key: value for key, value in facts.items() if value}


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
    """Plot policies with bytes, latency and success; the study separately, since its times are from another run."""
    blocks: list[Block] = []
    own = merge([result for result in results if result.get("kind") not in SEPARATE_KINDS])
    studied = [arm for result in results if result.get("kind") == STUDY for arm in pooled(result["rows"])]
    for name, rows, caption in (
        (
            "pareto",
            own,
            "Filled: no other policy is at least as good in bytes, latency and success and better in one of them.",
        ),
        (
            "pareto-recovery",
            studied,
            "The same for the policies of the recovery study, all seeds pooled; times are from a separate run.",
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
    """Return the median in milliseconds, with an interval if the trials are recorded."""
    trials, block = row.get("trials_ms") or [], row.get("block", 1)
    rounds = [trials[i : i + block] for i in range(0, len(trials), block)]
    value = row["latency_ms"]["p50"]
    return percentile_interval(rounds, 50) if len(rounds) > 1 else Estimate(value, value, value)


def pooled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Pool the episodes of all seeds of each arm of the study."""
    pools = []
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = [row for row in rows if row["name"] == name]
        episodes = sum(row["episodes"] for row in seeds)
        solved = sum(round(row["success"] * row["episodes"]) for row in seeds)
        pool = {"success": solved / episodes, "episodes": episodes, "interval": list(wilson(solved, episodes))}
        pools.append({**seeds[0], **pool})
    return pools


def resources(results: Sequence[Row], rows: Sequence[Row]) -> list[Block]:
    """Tabulate measured throughput and energy; state the source of energy figures or why there are none."""
    blocks: list[Block] = []
    throughput = [
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
    if throughput:
        header = ("policy", "concurrent", "chunks per second", "actions per second", "CPU time per chunk")
        blocks.append(ReportTable(header, throughput))
    metered = [row for row in rows if row.get("energy")]
    if metered:
        heads = ("policy", "joules per chunk", "per action", "per chunk above idle", "watts", "idle")
        blocks.append(ReportTable(heads, [_energy(row) for row in metered]))
    sources = dict.fromkeys(str(result["source"]) for result in results if result.get("kind") == "energy")
    return blocks + [Note(f"Energy: {source}.") for source in sources]


def _energy(row: Row) -> list[Cell]:
    energy = row["energy"]
    joules = [energy[key] for key in ("joules_chunk", "joules_action", "joules_chunk_above_idle")]
    estimates = [Cell(f"{one['value']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}") for one in joules]
    return [Cell(row["name"]), *estimates, Cell(f"{energy['watts']:.2f}"), Cell(f"{energy['idle_watts']:.2f}")]


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
    caption = "One point per seed. Lines: episodes sampled during PPO, which differ from the evaluation episodes."
    return [Chart("recovery", tradeoffs.recovery(panels, levels), caption)]


def arms(rows: Sequence[Row]) -> list[RecoveryCurve]:
    curves = []
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = [row for row in rows if row["name"] == name]
        points = [(row["cpu_minutes"], row["success"], *row["interval"]) for row in seeds]
        paths = [[(at["cpu_minutes"], at["sampled_success"]) for at in row["curve"]] for row in seeds if row["curve"]]
        curves.append(RecoveryCurve(name, points, paths))
    return curves


# Other runtimes


def peers(results: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = []
    for result in results:
        if result.get("kind") != PEERS:
            continue
        measured = [row for row in result["rows"] if not row.get("skipped")]
        ratios = {name: Estimate(*values) for name, values in result["ratios"].items()}
        caption = f"{result['policy']}: latency in multiples of {result['ours']}, measured in turn in one run."
        if result.get("wanted"):
            caption += f" Dashed: the target of {result['wanted']:g}x."
        spent = {name: Estimate(*values) for name, values in (result.get("cpu_ratios") or {}).items()}
        load = f"Machine load: {min(result['load'])} to {max(result['load'])}." if result.get("load") else ""
        against = f"relative to {result['ours']}"
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
    def against(values: Mapping[str, Estimate]) -> Cell:
        ratio = values.get(row["name"])
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
