"""Static scales of 8-bit products, from the range of their inputs on the golden observations, in float32."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import GOLDEN, Artifact, GraphSpec
from rlrc.exporters.graphs import find_graphs
from rlrc.exporters.graphs.builder import INT8_MIN_INPUTS, join_names
from rlrc.exporters.graphs.weights import Weights
from rlrc.exporters.tensorrt.builder import E4M3_MAX, EightBit, TensorRTBuilder, TensorRTFormat
from rlrc.exporters.tensorrt.cpu_reference import CpuReferenceEngine
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.policy import LocalPolicy

MAX_ROUNDING = 0.02
"""A product stays in 16 bits if a static scale would round its inputs by more than this, relative to their root mean
square. Some blocks of language models have a few huge values; a scale for these would round the others to zero."""
PREFIX = "input of "


class InputRangeBuilder(TensorRTBuilder):
    """Adds outputs: the largest magnitude and the mean square of every product's input."""

    def _product(self, x: str, *modules: str) -> str:
        name = join_names([f"{module}.weight" for module in modules])
        if self.weights.shape(f"{modules[0]}.weight")[1] >= INT8_MIN_INPUTS:
            largest = self._op("ReduceMax", self._op("Abs", x), keepdims=0)
            square = self._op("ReduceMean", self.multiply(x, x), keepdims=0)
            both = self.concat(*(self.reshape(value, 1) for value in (largest, square)), axis=0)
            self.output(f"{PREFIX}{name}", both, "float32", (2,))
        return super()._product(x, *modules)


class RangeRecorder:
    """The CPU reference of TensorRT's graphs, recording the ranges of the products' inputs."""

    def __init__(self, artifact: Artifact) -> None:
        self.engine = CpuReferenceEngine(artifact)
        self.ranges: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self.engine.run(graph, inputs)
        for name in [name for name in outputs if name.startswith(PREFIX)]:
            self.ranges[name.removeprefix(PREFIX)].append(outputs.pop(name))
        return outputs

    def versions(self) -> dict[str, str]:
        return self.engine.versions()


def measure_scales(parent: Artifact, weights: Weights, eight: EightBit) -> dict[str, float]:
    """The input scale of every product that 8 bits suffice for, by the ``join_names`` of its weights.

    Needs room for the policy in float32 on the disk and, while it runs, in memory.
    """
    manifest = parent.manifest
    with tempfile.TemporaryDirectory() as folder:
        specs = []
        for name, define in find_graphs(manifest.policy.family).items():
            builder = InputRangeBuilder(weights, TensorRTFormat("float32"))
            define(builder, manifest.policy, manifest.towers)
            builder.write(name, Path(folder, f"{name}.onnx"))
            outputs = tuple(builder.outputs)
            specs.append(GraphSpec(name, "tensorrt", f"{name}.onnx", "fp32", tuple(builder.inputs), outputs, {}))
        recorder = RangeRecorder(Artifact(Path(folder), replace(manifest, graphs=tuple(specs)), ""))
    described = tuple(
        replace(spec, outputs=tuple(output for output in spec.outputs if not output.name.startswith(PREFIX)))
        for spec in specs
    )
    artifact = Artifact(parent.path, replace(manifest, graphs=described), parent.digest)
    verify.replay(
        LocalPolicy(artifact, backend="tensorrt", engine=recorder),
        verify.read_golden(parent.file(GOLDEN), manifest.policy),
    )
    of = int8_scale if eight == "int8" else fp8_scale
    return {name: scale for name, ranges in recorder.ranges.items() if (scale := of(np.stack(ranges))) is not None}


def fp8_scale(ranges: NDArray[np.float32]) -> float | None:
    """``int8_scale`` for 8-bit floats, which round large and small numbers alike, by at most 3 %."""
    largest = float(ranges[:, 0].max())
    return largest / E4M3_MAX if largest > 0 else None


def int8_scale(ranges: NDArray[np.float32]) -> float | None:
    """Largest magnitudes and mean squares (N, 2) -> the step that covers the largest; None if it is too coarse.

    Rounding to steps has a root mean square error of step / sqrt(12).
    """
    step, size = float(ranges[:, 0].max()) / 127, float(ranges[:, 1].astype(np.float64).mean()) ** 0.5
    return step if 0 < step / 12**0.5 <= MAX_ROUNDING * size else None
