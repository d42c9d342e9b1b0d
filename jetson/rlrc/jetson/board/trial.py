"""Tries an artifact on this board: golden observations through each engine that is here, and their latency."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlrc import artifact as artifacts
from rlrc.artifact import GOLDEN, Artifact, VerifiedSpec
from rlrc.benchmarks.cli.output import progress, result_of
from rlrc.benchmarks.measure import latency
from rlrc.benchmarks.results.results import NamedArtifact, facts
from rlrc.errors import UserError
from rlrc.jetson.board.doctor import Finding
from rlrc.runtime.board import monitor
from rlrc.runtime.board.monitor import Board
from rlrc.runtime.inference import backends, verify
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import LocalPolicy, find_record

BLOCK = 10


def try_out(path: Path, trials: int, threads: int) -> tuple[list[Finding], dict[str, Any]]:
    """A finding for each set of graphs, and a result as `rlrc bench latency` writes it, with ``verified``.

    ``trials`` inferences of each engine, in turn. Raises UserError for an artifact that is damaged or has no graphs.
    """
    artifact = artifacts.load(path, verify=("graphs", "tokenizer", GOLDEN))
    backends.choose(artifact.manifest, None, path)  # refuses one without graphs
    findings, policies, records = [], {}, []
    for backend in backends.list_backends(artifact.manifest):
        finding, policy, record = _replay(artifact, backend, threads)
        findings.append(finding)
        if record is not None:
            records.append(record)
        if policy is not None:
            policies[backend] = policy
    rows, during = _measure_latency(artifact, policies, trials) if policies else ([], None)
    result = result_of("latency", rows, threads) | {"verified": [asdict(record) for record in records]}
    return findings, result if during is None else result | {"board": during}


def _replay(artifact: Artifact, backend: str, threads: int) -> tuple[Finding, LocalPolicy | None, VerifiedSpec | None]:
    name = f"goldens on {backend}"
    if backend not in backends.list_runnable(artifact.manifest):
        return Finding(name, "none", "needs TensorRT and a GPU, which are not here"), None, None
    try:
        policy = LocalPolicy(artifact, threads, backend)
        golden = verify.read_golden(artifact.file(GOLDEN), artifact.manifest.policy)
        record = verify.measure(policy, golden, verify.recorded_tolerances(find_record(artifact, backend)))
    except ModuleNotFoundError as error:
        return Finding(name, "advice", f"the module {error.name} is not installed", "rlrc jetson install"), None, None
    except (UserError, NoAction) as error:
        return (
            Finding(name, "fix", str(error), "export the artifact again, with the versions of this board"),
            None,
            None,
        )
    reason = verify.failure_reason(record)
    if reason is not None:
        return Finding(name, "fix", reason, "export the artifact again, with the versions of this board"), None, record
    text = f"{record.observations} observations, at most {max(record.max_error):.3g} off in action units"
    return Finding(name, "ok", text), policy, record


def _measure_latency(
    artifact: Artifact, policies: dict[str, LocalPolicy], trials: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows by engine, and the board's readings in the meantime."""
    observed = latency.observations(artifact)
    with Board.monitor() as watched, progress("inferences", trials * len(policies)) as advance:
        timed = latency.measure(policies, dict.fromkeys(policies, observed), trials, BLOCK, tick=advance)
    described = facts(NamedArtifact(artifact.path.resolve().name, artifact))
    rows = [described | {"name": f"{described['name']} {name}"} | latency.row(found) for name, found in timed.items()]
    return rows, monitor.summarise(watched.readings())


def lines(result: dict[str, Any]) -> list[str]:
    """The rows in words."""
    rows = [
        f"{row['name']}: p50 {row['latency_ms']['p50']:.2f}, p99 {row['latency_ms']['p99']:.2f} ms an action chunk"
        for row in result["rows"]
    ]
    return [*rows, monitor.format_summary(result["board"])] if "board" in result else rows
