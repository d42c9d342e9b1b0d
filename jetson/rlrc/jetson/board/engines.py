"""Builds one engine from one graph with TensorRT's Python API (10.3 and later; TensorRT-RTX has the same).

``trt`` is TensorRT's module. Callers import it: this module must be importable without TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlrc.artifact.build_plan import BuildPlan, GraphPlan
from rlrc.errors import UserError
from rlrc.runtime.inference.backends import nvidia

Watch = Callable[[str, float], str | None]
"""Called with the phase of the build and the part of it that is done. A returned reason ends the build."""


def build_engine(
    trt: Any,
    graph: GraphPlan,
    plan: BuildPlan,
    folder: Path,
    timing: bytes = b"",
    target: Callable[[Any], None] = lambda config: None,
    watch: Watch = lambda phase, done: None,
) -> tuple[memoryview, bytes]:
    """The serialized engine of a graph in the artifact ``folder``, and the measured timings of kernels.

    ``timing``: those of earlier builds; ``target`` completes the builder's configuration. Raises UserError with
    TensorRT's own reason for a graph that it cannot parse or build.
    """
    nvidia.check_version(trt, plan)
    log = nvidia.make_logger(trt)
    builder = trt.Builder(log)
    typed = getattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None
    )  # None: later releases have no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(folder / next(iter(graph.files)))):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(f"{error.node_operator()} (node {error.node()}): {error.desc()}" for error in errors)
        raise UserError(_refused(trt, graph, plan, "parses", reasons))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_bytes)
    for bounds_of in graph.profiles:
        profile = builder.create_optimization_profile()
        for name, bounds in bounds_of.items():
            profile.set_shape(name, bounds.min, bounds.opt, bounds.max)
        config.add_optimization_profile(profile)
    known = config.create_timing_cache(timing)
    if known is None or not config.set_timing_cache(known, ignore_mismatch=False):  # damaged, or of another GPU
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    config.progress_monitor = monitor = _monitor(trt, watch)
    target(config)
    engine = builder.build_serialized_network(network, config)
    if engine is None and monitor.stopped:
        raise UserError(f"expected to build {graph.name}, gave up: {monitor.stopped}")
    if engine is None:
        raise UserError(_refused(trt, graph, plan, "builds", "; ".join(log.errors)))
    return memoryview(engine), bytes(config.get_timing_cache().serialize())


def _refused(trt: Any, graph: GraphPlan, plan: BuildPlan, does: str, reason: str) -> str:
    advice = "export the artifact again with another --precision"
    if plan.int4_block is not None and plan.int4_block not in (64, 128):
        advice += f" (TensorRT's documentation has int4 blocks of 64 and 128, these are of {plan.int4_block})"
    text = " ".join(reason.split()) or "no reason"
    return f"expected a graph that TensorRT {trt.__version__} {does}, found {graph.name}: {text}; {advice}"


def _monitor(trt: Any, watch: Watch) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]
        """TensorRT reports nested phases, each with a number of steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.stopped is None:
                self.stopped = watch(phase_name, (step + 1) / max(1, self.steps.get(phase_name, 1)))
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
