"""Static scales of 8-bit products: what their inputs reach on the golden observations, in float32."""

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
from rlrc.exporters.graphs import graphs_of
from rlrc.exporters.graphs.builder import INT8_MIN_INPUTS, joined
from rlrc.exporters.graphs.weights import Weights
from rlrc.exporters.tensorrt.builder import E4M3_MAX, Eight, TensorRTBuilder, TensorRTFormat
from rlrc.exporters.tensorrt.cpu_reference import CpuReferenceEngine
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.policy import LocalPolicy

MAX_ROUNDING = 0.02
"""A product whose inputs a static scale would round by more than this, relative to their size, keeps 16 bits: the few
huge values that some blocks of a language model have would leave no steps to the others."""
PREFIX = "input of "


class Watching(TensorRTBuilder):
    """Gives the largest magnitude and the mean square of every product's input as outputs."""

    def _product(self, x: str, *modules: str) -> str:
        name = joined([f"{module}.weight" for module in modules])
        if self.weights.shape(f"{modules[0]}.weight")[1] >= INT8_MIN_INPUTS:
            largest = self._op("ReduceMax", self._op("Abs", x), keepdims=0)
            square = self._op("ReduceMean", self.multiply(x, x), keepdims=0)
            both = self.concat(*(self.reshape(value, 1) for value in (largest, square)), axis=0)
            self.output(f"{PREFIX}{name}", both, "float32", (2,))
        return super()._product(x, *modules)


class RangeRecorder:
    """The stand-in for TensorRT, keeping what the products' inputs reached."""

    def __init__(self, artifact: Artifact) -> None:
        self.engine = CpuReferenceEngine(artifact)
        self.seen: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self.engine.run(graph, inputs)
        for name in [name for name in outputs if name.startswith(PREFIX)]:
            self.seen[name.removeprefix(PREFIX)].append(outputs.pop(name))
        return outputs

    def versions(self) -> dict[str, str]:
        return self.engine.versions()


def scales(parent: Artifact, weights: Weights, eight: Eight) -> dict[str, float]:
    """What 1 stands for in every product's input that 8 bits suffice for, by its weights' joined name.

    Holds the policy in float32, one graph after the other on the disk and all in memory while it runs.
    """
    manifest = parent.manifest
    with tempfile.TemporaryDirectory() as folder:
        specs = []
        for name, define in graphs_of(manifest.policy.family).items():
            builder = Watching(weights, TensorRTFormat("float32"))
            define(builder, manifest.policy, manifest.towers)
            builder.write(name, Path(folder, f"{name}.onnx"))
            outputs = tuple(builder.outputs)
            specs.append(GraphSpec(name, "tensorrt", f"{name}.onnx", "fp32", tuple(builder.inputs), outputs, {}))
        recorder = RangeRecorder(Artifact(Path(folder), replace(manifest, graphs=tuple(specs)), ""))
    told = tuple(
        replace(spec, outputs=tuple(output for output in spec.outputs if not output.name.startswith(PREFIX)))
        for spec in specs
    )
    artifact = Artifact(parent.path, replace(manifest, graphs=told), parent.digest)
    verify.replay(
        LocalPolicy(artifact, backend="tensorrt", engine=recorder),
        verify.read_golden(parent.file(GOLDEN), manifest.policy),
    )
    of = step_of if eight == "int8" else one_of
    return {name: scale for name, seen in recorder.seen.items() if (scale := of(np.stack(seen))) is not None}


def one_of(seen: NDArray[np.float32]) -> float | None:
    """As ``step_of``, of 8-bit floats: they round large and small numbers alike, by 3 % at most."""
    largest = float(seen[:, 0].max())
    return largest / E4M3_MAX if largest > 0 else None


def step_of(seen: NDArray[np.float32]) -> float | None:
    """Largest magnitudes and mean squares (N, 2) -> the step that reaches the largest; None if it is too coarse.

    Rounding to steps errs by step / sqrt(12) in the root mean square.
    """
    step, size = float(seen[:, 0].max()) / 127, float(seen[:, 1].astype(np.float64).mean()) ** 0.5
    return step if 0 < step / 12**0.5 <= MAX_ROUNDING * size else None
