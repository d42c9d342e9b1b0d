"""The graphs of an artifact as TensorRT engines, which `rlrc jetson build` built on this device.

Written from TensorRT's documentation (10.3 and later); not yet run on a device. The parts that need no device (shapes,
profiles, memory, capture) are in ``tensorrt_passes`` and ``tensorrt_memory``.
"""

from __future__ import annotations

import mmap
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import Artifact
from rlrc.artifact.build_plan import PLAN, BuildPlan, read_plan
from rlrc.errors import UserError
from rlrc.runtime.inference.backends import nvidia
from rlrc.runtime.inference.backends.cuda import Cuda
from rlrc.runtime.inference.backends.engine_cache import check_graphs, engine_cache, engine_file, is_intact
from rlrc.runtime.inference.backends.tensorrt_passes import Context, Passes
from rlrc.runtime.inference.decode import NoAction

NAME = "tensorrt"


class TensorRT:
    """One engine per graph. All share one memory for activations, since they run one after the other."""

    def __init__(self, artifact: Artifact) -> None:
        plan = read_plan(artifact.file(PLAN))
        check_graphs(artifact, plan)
        sm = nvidia.device_sm()
        nvidia.check_sm(plan, sm)
        self._trt, self._sm = nvidia.import_tensorrt(), sm
        nvidia.check_version(self._trt, plan)
        files = engine_files(artifact.path, plan, self._trt.__version__, sm)
        specs = {graph.name: graph for graph in artifact.manifest.graphs if graph.backend == NAME}
        self._log = nvidia.make_logger(self._trt)
        try:
            self._device = Cuda()
            self._runtime = self._trt.Runtime(self._log)
            self._engines = {name: self._read(file) for name, file in files.items()}
            self._passes = Passes(specs, plan, self._contexts(), self._device, self._reason)
        except NoAction as error:
            raise UserError(f"expected a GPU with room for {artifact.path}, found: {error}; free some memory") from None

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name: see engine.Engine. Raises NoAction if the device fails."""
        return self._passes.run(graph, inputs)

    def versions(self) -> dict[str, str]:
        """Versions that a measurement on this engine depends on."""
        return {
            NAME: self._trt.__version__,
            "sm": str(self._sm),
            "numpy": np.__version__,
            "machine": platform.machine(),
        }

    def _read(self, file: Path) -> Any:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise UserError(f"expected an engine that TensorRT loads, found {file}: {self._reason()}; build it again")
        return engine

    def _contexts(self) -> dict[str, list[Context]]:
        """One context per profile: changing a context's profile takes longer than a token."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        size = max(1, *(engine.device_memory_size_v2 for engine in self._engines.values()))
        self._activations = self._device.own(size)
        contexts: dict[str, list[Context]] = {}
        for name, engine in self._engines.items():
            contexts[name] = []
            for profile in range(engine.num_optimization_profiles):
                context = engine.create_execution_context(strategy)
                if context is None:
                    raise UserError(f"expected memory to run {name}, found: {self._reason()}; free some")
                context.set_device_memory(self._activations.address, size)
                if not context.set_optimization_profile_async(profile, self._device.stream):
                    raise UserError(f"expected profile {profile} of {name}, found: {self._reason()}; build it again")
                contexts[name].append(context)
        self._device.finish()
        return contexts

    def _reason(self) -> str:
        errors = "; ".join(" ".join(text.split()) for text in self._log.errors) or "no reason given"
        self._log.errors.clear()
        return errors


def engine_files(path: Path, plan: BuildPlan, version: str, sm: int) -> dict[str, Path]:
    """The engine file of every graph. Raises UserError if one is missing or damaged."""
    cache = engine_cache()
    files = {graph.name: engine_file(cache, plan, graph, version, sm) for graph in plan.graphs}
    missing = [name for name, file in files.items() if not is_intact(file)]
    if missing:
        raise UserError(
            f"expected engines for TensorRT {version} and SM {sm} in {cache}, found none of {', '.join(missing)}; "
            f"run rlrc jetson build {path}, or choose another --backend"
        )
    return files
