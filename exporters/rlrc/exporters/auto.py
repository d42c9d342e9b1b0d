"""``rlrc export --precision auto``: measure which precision of every graph is fastest on this machine.

The answer depends on the processor. With matrix units, 8-bit products over a whole prompt are ten times as fast as
floats; without them they are hardly faster. Where memory bandwidth is the limit, 4-bit weights are fastest. Every
precision that the weights can have is timed on golden observations, in turns. Combinations are then exported, fastest
first, until one stays within the tolerance. Measure on the robot's computer, with the robot's number of threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from time import perf_counter
from typing import Any

from numpy.typing import NDArray

from rlrc.artifact import GOLDEN, Artifact, Manifest, create_artifact
from rlrc.errors import UserError
from rlrc.exporters.export import Disagreement, export, replace_graphs
from rlrc.exporters.graphs import find_graphs
from rlrc.exporters.graphs.weights import read_weights
from rlrc.exporters.onnx.builder import FORMATS
from rlrc.exporters.onnx.mixed import MIXED
from rlrc.exporters.onnx.target import build_graph, list_precisions, write_graphs
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.policy import LocalPolicy

ROUNDS = 7  # observations timed; the first is a warm-up
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Candidate:
    """``ms``: the fastest time of all passes of the graph for one action; ``memory``: bytes of loaded weights."""

    graph: str
    precision: str
    ms: float
    memory: int


class TimedGraphs:
    """An engine that sums the milliseconds of each graph's passes."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ms = engine, dict[str, float]()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        started = perf_counter()
        outputs = self.engine.run(graph, inputs)
        self.ms[graph] = self.ms.get(graph, 0.0) + (perf_counter() - started) * 1e3
        return outputs

    def versions(self) -> dict[str, str]:
        return self.engine.versions()


def export_fastest(
    parent: Artifact,
    out: Path,
    to: Sequence[str] = ("onnx",),
    threads: int = 1,
    tolerance: float | None = None,
    budget: int | None = None,
) -> Manifest:
    """Export in the fastest precisions whose weights take at most ``budget`` bytes in memory.

    The measurements are recorded in the history. Raises UserError for a target other than onnx or if no combination
    fits the budget, and Disagreement if none that fits stays within the tolerance.
    """
    if tuple(to) != ("onnx",):
        raise UserError(f"expected --to onnx with --precision auto, found {' '.join(to)}; name a precision for others")
    candidates = measure_candidates(parent, threads)
    refused: list[Disagreement] = []
    for plan in rank_plans(candidates, budget):
        precisions = {candidate.graph: candidate.precision for candidate in plan}
        reasons = {
            "auto": {"threads": threads, "budget_bytes": budget, "refused": len(refused)},
            "measured_ms": {f"{each.graph} {each.precision}": round(each.ms, 3) for each in candidates},
            "memory_bytes": sum(candidate.memory for candidate in plan),
        }
        try:
            manifest = export(parent, out, to, precisions, tolerance, reasons)
        except Disagreement as error:
            refused.append(error)
        else:
            for other in refused:
                other.worst.unlink(missing_ok=True)
            return manifest
    raise refused[-1]


def rank_plans(candidates: Sequence[Candidate], budget: int | None = None) -> list[tuple[Candidate, ...]]:
    """All combinations of one candidate per graph that fit the budget, fastest first. Raises UserError if none fits."""
    graphs = list(dict.fromkeys(candidate.graph for candidate in candidates))
    plans = list(product(*([each for each in candidates if each.graph == graph] for graph in graphs)))
    sizes = [sum(candidate.memory for candidate in plan) for plan in plans]
    fitting = [plan for plan, size in zip(plans, sizes, strict=True) if budget is None or size <= budget]
    if not fitting:
        raise UserError(
            f"expected graphs that fit into {budget:,} bytes, found that the smallest take {min(sizes):,}; allow more "
            "with --budget-bytes, or quantize or prune the policy further"
        )
    return sorted(fitting, key=lambda plan: sum(candidate.ms for candidate in plan))


def measure_candidates(parent: Artifact, threads: int) -> list[Candidate]:
    """Time every graph in every precision of these weights, in turns, on golden observations.

    Packed precisions are skipped: they differ from another one in the file only, and need much memory to load.
    """
    manifest, weights = parent.manifest, read_weights(parent)
    precisions = [name for name in list_precisions(manifest) if name == MIXED or not FORMATS[name].packed]
    golden = verify.read_golden(parent.file(GOLDEN), manifest.policy)
    observations = cycle(golden.observation(i, manifest.policy) for i in range(len(golden)))
    best: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        policies = {}
        for precision in precisions:
            with create_artifact(Path(folder) / precision) as draft:
                draft.inherit(parent, TOKENIZER)
                written = draft.finish(replace_graphs(manifest, draft, write_graphs(draft, parent, precision)))
            artifact = Artifact(Path(folder) / precision, written, digest="")
            policies[precision] = LocalPolicy(artifact, threads, backend="onnxruntime")
        for i, observation in enumerate(islice(observations, ROUNDS)):
            for precision, policy in policies.items():
                policy.engine = timed = TimedGraphs(getattr(policy.engine, "engine", policy.engine))
                policy.infer(observation)
                for graph, ms in timed.ms.items() if i else ():
                    best[graph, precision] = min(ms, best.get((graph, precision), ms))
    return [
        Candidate(graph, precision, best[graph, precision], build_graph(weights, manifest, graph, precision).memory)
        for graph in find_graphs(manifest.policy.family)
        for precision in precisions
    ]
