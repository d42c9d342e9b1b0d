"""Check the claims on memory, latency and success of one artifact against its dense parent: PASS or FAIL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlrc.artifact import GOLDEN, Artifact, Manifest
from rlrc.benchmarks.measure.latency import Trials
from rlrc.benchmarks.measure.success import compare, same_scenes
from rlrc.benchmarks.results.results import NamedArtifact, facts, sizes
from rlrc.benchmarks.results.stats import Estimate, difference_limit, paired_difference_limit, ratio_interval
from rlrc.errors import UserError
from rlrc.runtime.inference.verify import read_golden
from rlrc.strict import read_toml

SAME = "compare a policy with its dense parent"


@dataclass(frozen=True)
class Thresholds:
    memory_ratio: float
    latency_ratio: float
    success_margin: float
    success_episodes: int


@dataclass(frozen=True)
class ClaimCheck:
    """One claim. ``limit``: the end of the interval that must reach the threshold; None for exact values."""

    claim: str
    verdict: str  # PASS, FAIL or NOT MEASURED
    value: float | None
    limit: float | None
    threshold: float
    reason: str


def thresholds(path: Path | None = None) -> Thresholds:
    """Read thresholds from a TOML file (default: claims.toml in this folder). Raises UserError for an invalid one."""
    file = path or files("rlrc.benchmarks.claims") / "claims.toml"
    advice = "compare with rlrc/benchmarks/claims/claims.toml"
    sections = read_toml(dict[str, dict[str, int | float]], file, f"thresholds in {file}", advice)
    flat = {f"{section}_{key}": value for section, entries in sections.items() for key, value in entries.items()}
    expected = [field.name for field in fields(Thresholds)]
    if sorted(flat) != sorted(expected):
        raise UserError(f"expected numbers {', '.join(expected)} in {file}, found {flat}; {advice}")
    return Thresholds(**flat)  # type: ignore[arg-type]


def figure(check: ClaimCheck, number: float | None) -> str:
    """A ratio, or a signed difference of success rates."""
    if number is None:
        return "\u2013"
    return f"{number:+.3f}" if check.claim == "success" else f"{number:.2f}x"


def check_comparable(compressed: Manifest, baseline: Manifest) -> None:
    """Raises UserError unless cameras, state and the shape of chunks are the same."""
    spec, baseline_spec = compressed.policy, baseline.policy
    for what, a, b in (
        ("cameras", spec.cameras, baseline_spec.cameras),
        ("state", spec.state and spec.state.names, baseline_spec.state and baseline_spec.state.names),
        ("horizon", spec.action.horizon, baseline_spec.action.horizon),
        ("action dimensions", spec.action.names, baseline_spec.action.names),
    ):
        if a != b:
            raise UserError(f"expected the baseline's {what} ({b}), found {a}; {SAME}")


def check_same_tasks(compressed: Artifact, baseline: Artifact) -> None:
    """Raises UserError unless the golden observations, which every stage copies, have the same instructions."""
    tasks = []
    for artifact in (compressed, baseline):
        golden = read_golden(artifact.file(GOLDEN), artifact.manifest.policy)
        tasks.append(set() if golden.instructions is None else set(map(str, golden.instructions)))
    if tasks[0] != tasks[1]:
        raise UserError(f"expected policies of the same tasks, found {describe_difference(*tasks)}; {SAME}")


def describe_difference(compressed: Collection[str], baseline: Collection[str]) -> str:
    """Name the first entry that only one of them has."""
    only, only0 = sorted(set(compressed) - set(baseline)), sorted(set(baseline) - set(compressed))
    return f"{only[0]!r} in the compressed one only" if only else f"{only0[0]!r} in the baseline only"


def memory(compressed: Manifest, baseline: Manifest, limits: Thresholds) -> ClaimCheck:
    compressed_size, baseline_size = sizes(compressed), sizes(baseline)
    ratio = baseline_size["bytes"] / compressed_size["bytes"]
    reason = " against ".join(
        f"{one['bytes'] / 1e6:.2f} MB ({one['counting']})" for one in (baseline_size, compressed_size)
    )
    return ClaimCheck("memory", _verdict(ratio >= limits.memory_ratio), ratio, None, limits.memory_ratio, reason)


def memory_of_sizes(stored: float, resident: float, limits: Thresholds) -> ClaimCheck:
    """From the ratios of graph bytes and of peak resident sets; ``limit`` is the smaller one."""
    least = min(stored, resident)
    reason = f"graph files {stored:.2f}x, peak resident set {resident:.2f}x"
    return ClaimCheck("memory", _verdict(least >= limits.memory_ratio), stored, least, limits.memory_ratio, reason)


def latency(compressed: Trials, baseline: Trials, limits: Thresholds) -> ClaimCheck:
    """``limit`` is the lower end of the two-sided 95 % interval of the ratio of medians."""
    reason = f"{len(compressed.total)} interleaved trials each"
    if not (compressed.stable and baseline.stable):
        reason += ", the warm-up did not become stable"
    return latency_of_ratio("latency", ratio_interval(baseline.rounds(), compressed.rounds()), reason, limits)


def latency_of_ratio(claim: str, ratio: Estimate, reason: str, limits: Thresholds) -> ClaimCheck:
    """From a ratio of medians with its 95 % interval."""
    verdict = _verdict(ratio.low >= limits.latency_ratio)
    return ClaimCheck(claim, verdict, ratio.value, ratio.low, limits.latency_ratio, reason)


def success(compressed: Mapping[str, Any] | None, baseline: Mapping[str, Any] | None, limits: Thresholds) -> ClaimCheck:
    """From two rows of success results; ``limit`` is the one-sided 95 % lower limit of the difference.

    Paired (Tango) where both rows hold outcomes of the same scenes, else as independent samples. Raises UserError for
    different tasks.
    """
    if compressed is None or baseline is None:
        advice = "pass --success FILE.json or --episodes-per-task"
        return ClaimCheck("success", "NOT MEASURED", None, None, -limits.success_margin, advice)
    tasks = [row.get("per_task", row.get("outcomes", {})).keys() for row in (compressed, baseline)]
    if tasks[0] != tasks[1]:
        raise UserError(
            f"expected success on the same tasks, found {describe_difference(*tasks)}; measure both in one run"
        )
    counts = [round(row["success"] * row["episodes"]) for row in (compressed, baseline)]
    episodes = [row["episodes"] for row in (compressed, baseline)]
    difference = counts[0] / episodes[0] - counts[1] / episodes[1]
    if same_scenes(compressed, baseline):
        pair = compare(compressed, baseline)
        limit = paired_difference_limit(pair["only"], pair["only_baseline"], pair["pairs"])
        how = "the same scenes, paired"
    else:
        limit, how = difference_limit(counts[0], episodes[0], counts[1], episodes[1]), "independent scenes"
    reason = f"{counts[0]}/{episodes[0]} against {counts[1]}/{episodes[1]}, {how}"
    enough = min(episodes) >= limits.success_episodes
    if not enough:
        reason += f"; at least {limits.success_episodes} episodes of each are needed"
    holds = enough and limit > -limits.success_margin
    return ClaimCheck("success", _verdict(holds), difference, limit, -limits.success_margin, reason)


def find_success(results: Sequence[Mapping[str, Any]], named: NamedArtifact) -> dict[str, Any] | None:
    """The row measured on exactly this artifact (by digest), under any name."""
    for result in results:
        for row in result["rows"]:
            if row.get("digest") == named.artifact.digest and row.get("success") is not None:
                return {**row, "name": named.name}
    return None


def operating_point(
    compressed: NamedArtifact, baseline: NamedArtifact, threads: int, versions: Mapping[str, str]
) -> dict[str, Any]:
    """The conditions under which the verdict holds."""
    manifest, baseline_manifest = compressed.artifact.manifest, baseline.artifact.manifest
    quantization = manifest.quantization
    return {
        "compressed": facts(compressed),
        "baseline": facts(baseline),
        "pruned": measure_cuts(manifest, baseline_manifest),
        "stages": [entry.stage for entry in manifest.history],
        "prune": [entry.config for entry in manifest.history if entry.stage == "prune"],
        "quantization": quantization
        and {
            "grid": quantization.grid,
            "group": quantization.group,
            "tensors": {str(bits): count for bits, count in Counter(quantization.tensors.values()).items()},
        },
        "threads": threads,
        "versions": dict(versions),
    }


def measure_cuts(compressed: Manifest, baseline: Manifest) -> dict[str, float]:
    """Share of parameters cut from the whole policy, and for every tower that differs the shares of its blocks and of
    the heads and MLP channels of the intermediate blocks. Negative where the baseline is smaller.
    """
    shares = {}
    for name, full in baseline.towers.items():
        cut = compressed.towers.get(name, replace(full, layers=()))
        inner, inner0 = (tower.layers[1:-1] if len(full.layers) > 2 else tower.layers for tower in (cut, full))
        for what, now, before in (
            ("blocks", len(cut.layers), len(full.layers)),
            ("intermediate_heads", sum(layer.heads for layer in inner), sum(layer.heads for layer in inner0)),
            ("intermediate_channels", sum(layer.mlp for layer in inner), sum(layer.mlp for layer in inner0)),
        ):
            if now != before:
                shares[f"{name}_{what}"] = share_cut(now, before)
    return shares | {"whole_policy": share_cut(compressed.parameters, baseline.parameters)}


def share_cut(now: int, before: int) -> float:
    return round(1 - now / before, 4) if before else 0.0


def _verdict(holds: bool) -> str:
    return "PASS" if holds else "FAIL"
