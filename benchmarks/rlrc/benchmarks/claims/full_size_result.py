"""The result file of `rlrc bench claims --geometry`: benchmarks/results/claims-GEOMETRY.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlrc.artifact import Artifact, Manifest
from rlrc.benchmarks.claims import claims, roofline
from rlrc.benchmarks.claims.claims import Thresholds
from rlrc.benchmarks.claims.operating_points import OperatingPoint
from rlrc.benchmarks.claims.policy_process import ActionTimes
from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import precision, sizes
from rlrc.benchmarks.results.stats import Estimate, percentiles, ratio_interval
from rlrc.errors import UserError

WORDS = 20  # of the instruction, about the length of OpenVLA's prompt


@dataclass
class InterleavedTrials:
    """Actions of each policy of one interleaved run, in order, and the load average before each round.

    ``repeated``: the number of rounds that do not count, see full_size.run_interleaved.
    """

    actions: dict[str, list[ActionTimes]]
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    peak: float = 0.0  # operations a second of torch's products, if torch was measured
    repeated: int = 0

    def totals(self, name: str) -> list[float]:
        return [action.total for action in self.actions[name]]

    def cpu(self, name: str) -> list[float]:
        return [action.cpu for action in self.actions[name]]

    def faults(self, name: str) -> list[int]:
        """Pages of weights that each action read from disk; more than a few mean that memory was short."""
        return [action.faults for action in self.actions[name]]

    def parts(self, name: str) -> dict[str, list[float]]:
        first = self.actions[name][0].parts
        return {part: [action.parts[part] for action in self.actions[name]] for part in first}


def result(
    point: OperatingPoint,
    artifacts: Mapping[str, Artifact],
    pair: InterleavedTrials,
    other: InterleavedTrials | UserError | None,
    kind: str,
    peaks: roofline.Peaks,
    threads: int,
    limits: Thresholds,
) -> dict[str, Any]:
    """The content of the result file, with verdicts by `rlrc.benchmarks.claims.claims`.

    ``other``: the trials with torch, the error that stopped them, or None without torch. ``kind``: torch's type.
    """
    manifests = {name: artifact.manifest for name, artifact in artifacts.items()}
    rows = {name: row(manifests[name], pair, name, peaks) for name in ("dense", "compressed")}
    faster = ratio(pair, "dense")
    bytes_, resident_ = (rows["dense"][key] / rows["compressed"][key] for key in ("bytes", "peak_rss"))
    checks = [
        claims.memory_of_sizes(bytes_, resident_, limits),
        claims.latency_of_ratio("latency", faster, describe_trials(pair), limits),
    ]
    content: dict[str, Any] = {
        "kind": "claims of a geometry",
        "geometry": point.name,
        "runtime": point.runtime,
        "threads": threads,
        **{name: rows[name] for name in ("dense", "compressed")},
        "memory_ratio": round(bytes_, 3),
        "latency_ratio": round(faster.value, 3),
        "success": {"dense": None, "compressed": None, "episodes": 0, "interval": None},
    }
    claim = f"latency against torch {kind}"
    if isinstance(other, UserError):
        checks.append(claims.ClaimCheck(claim, "NOT MEASURED", None, None, limits.latency_ratio, str(other)))
    elif other is not None:
        against = ratio(other, "torch")
        checks.append(claims.latency_of_ratio(claim, against, describe_trials(other), limits))
        content["torch"] = torch_row(manifests["dense"], other, kind, peaks) | {
            "compressed_ms": round_times(other.totals("compressed")),
            "latency_ratio": round(against.value, 3),
            "latency_ratio_interval": [round(against.low, 3), round(against.high, 3)],
        }
        if point.elsewhere is not None:
            content["elsewhere"] = {"runtime": point.elsewhere[0]} | row(
                manifests["elsewhere"], other, "elsewhere", peaks
            )
            also = ratio(other, "torch", "elsewhere")
            content["elsewhere"] |= {
                "torch_latency_ratio": round(also.value, 3),
                "torch_latency_ratio_interval": [round(also.low, 3), round(also.high, 3)],
            }
    passed = all(check.verdict == "PASS" for check in checks)
    return content | {
        "verdict": "PASS" if passed else "FAIL",
        "command": machine.command(),
        "machine": machine.describe(threads),
        "peak_rss_ratio": round(resident_, 3),
        "latency_ratio_interval": [round(faster.low, 3), round(faster.high, 3)],
        "pruned": claims.measure_cuts(manifests["compressed"], manifests["dense"]),
        "instruction_tokens": WORDS,
        "rounds_repeated": pair.repeated + (other.repeated if isinstance(other, InterleavedTrials) else 0),
        "load": pair.load + (other.load if isinstance(other, InterleavedTrials) else []),
        "roofline": peaks.record(),
        "thresholds": asdict(limits),
        "checks": [asdict(check) for check in checks],
    }


def row(manifest: Manifest, trials: InterleavedTrials, name: str, peaks: roofline.Peaks) -> dict[str, Any]:
    memory, size = trials.memory[name], sizes(manifest)
    timed = trials.parts(name)
    return {
        "precision": precision(manifest),
        "bytes": size["bytes"] - size["tokenizer_bytes"],  # the tokenizer is a dummy
        "peak_rss": memory["peak"],
        "latency_ms": round_percentiles(trials.totals(name)),
        "parameters": manifest.parameters,
        "memory": {key: memory[key] for key in ("rss", "anonymous", "file")},
        "parts_ms": {part: round_percentiles(times) for part, times in timed.items()},
        "roofline": roofline.compare_with_limits(manifest, kernels(manifest), peaks, timed, WORDS),
        "cpu_ms": round_percentiles(trials.cpu(name)),
        "pages_read": trials.faults(name),
        "trials_ms": round_times(trials.totals(name)),
    }


def torch_row(dense: Manifest, trials: InterleavedTrials, kind: str, peaks: roofline.Peaks) -> dict[str, Any]:
    memory, timed = trials.memory["torch"], trials.parts("torch")
    graphs = dict.fromkeys(roofline.GRAPHS.values(), f"torch {kind}")
    return {
        "precision": kind,
        "peak_rss": memory["peak"],
        "latency_ms": round_percentiles(trials.totals("torch")),
        "parts_ms": {part: round_percentiles(times) for part, times in timed.items()},
        "roofline": roofline.compare_with_limits(dense, graphs, peaks, timed, WORDS),
        "cpu_ms": round_percentiles(trials.cpu("torch")),
        "pages_read": trials.faults("torch"),
        "trials_ms": round_times(trials.totals("torch")),
    }


def kernels(manifest: Manifest) -> dict[str, str]:
    """Graph -> the kernels that compute its products, by the names of roofline.KERNELS."""
    return {
        graph.name: f"llama.cpp {graph.precision}" if graph.file.endswith(".gguf") else graph.precision
        for graph in manifest.graphs
    }


def ratio(trials: InterleavedTrials, slow: str, fast: str = "compressed") -> Estimate:
    """Ratio of medians, with the 95 % interval over rounds."""
    slow_rounds, fast_rounds = ([[total] for total in trials.totals(name)] for name in (slow, fast))
    return ratio_interval(slow_rounds, fast_rounds)


def describe_trials(trials: InterleavedTrials) -> str:
    return f"{len(trials.load)} interleaved actions each, load {min(trials.load):.1f} to {max(trials.load):.1f}"


def round_percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in percentiles(milliseconds, (50, 90, 99)).items()}


def round_times(milliseconds: Sequence[float]) -> list[float]:
    return [round(value, 1) for value in milliseconds]
