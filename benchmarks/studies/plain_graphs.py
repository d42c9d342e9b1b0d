"""The graphs of benchmarks/studies/decoder_speed.py in standard ONNX operators, not optimised for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from rlrc.artifact import Artifact
from rlrc.exporters.graphs import find_graphs
from rlrc.exporters.graphs.builder import Activation, Builder
from rlrc.exporters.graphs.weights import read_weights


class PlainBuilder(Builder):
    """Uses standard operators, float32, and one product per layer, as a generic exporter would."""

    OPSETS = {"": 20}  # noqa: RUF012
    IR_VERSION = 9

    def table(self, name: str, array: np.ndarray, of: Any = ()) -> str:
        return self._store(name, array)

    def matmul(self, a: str, b: str) -> str:
        return self._op("MatMul", a, b)

    def convolution(self, x: str, module: str, scale: np.ndarray, bias: np.ndarray, **shape: Any) -> str:
        weight = self.multiply(self.weight(f"{module}.weight"), self.constant(scale.reshape(-1, 1, 1, 1)))
        return self._op("Conv", x, weight, self.constant(bias), **shape)

    def embed(self, ids: str, module: str) -> str:
        return self._op("Gather", self.weight(f"{module}.weight"), ids)

    def layer_norm(self, x: str, module: str, epsilon: float) -> str:
        scale, bias = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        return self._op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        mean = self._op("ReduceMean", self._op("Pow", x, self.scalar(2.0)), self.integers(-1), keepdims=1)
        root = self._op("Sqrt", self.add(mean, self.scalar(epsilon)))
        return self.multiply(self._op("Div", x, root), weight)

    def activation(self, x: str, kind: Activation) -> str:
        return self.multiply(x, self._op("Sigmoid", x)) if kind == "silu" else self._op("Gelu", x)

    def linear_activated(self, x: str, module: str, kind: Activation) -> str:
        return self.activation(self.linear(x, module, bias=True), kind)

    def linear_scaled(self, x: str, module: str, scale: str) -> str:
        return self.multiply(self.linear(x, module, bias=True), self.weight(scale))

    def rotary(self, x: str, heads: int, tables: tuple[str, str]) -> str:
        x = self.reshape(x, 0, 0, heads, -1)
        half = 32
        first, second = self.split(x, half, half)
        cos, sin = (self.reshape(table, -1, 1, half) for table in tables)
        real = self._op("Sub", self.multiply(first, cos), self.multiply(second, sin))
        imaginary = self.add(self.multiply(second, cos), self.multiply(first, sin))
        return self.reshape(self.concat(real, imaginary, axis=3), 0, 0, heads * 2 * half)

    def attention(self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int) -> str:
        q, k, v = (self.transpose(self.reshape(x, 0, 0, heads, head_dim), 0, 2, 1, 3) for x in (q, k, v))
        scores = self.multiply(self._op("MatMul", q, self.transpose(k, 0, 1, 3, 2)), self.scalar(head_dim**-0.5))
        mixed = self._op("MatMul", self._op("Softmax", scores, axis=-1), v)
        return self.reshape(self.transpose(mixed, 0, 2, 1, 3), 0, 0, heads * head_dim)

    def _product(self, x: str, *modules: str) -> str:
        parts = []
        for module in modules:
            matrix = np.ascontiguousarray(self.weights.array(f"{module}.weight").T)
            parts.append(self._op("MatMul", x, self._store(f"{module}.weight", matrix)))
        return parts[0] if len(parts) == 1 else self.concat(*parts, axis=2)


class Stock:
    """Runs the plain graphs in default ONNX Runtime sessions and passes keys and values through numpy."""

    def __init__(self, artifact: Artifact, folder: Path, int8: bool, threads: int) -> None:
        self.sessions: dict[str, Any] = {}
        self.past: dict[str, Any] = {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        weights, manifest = read_weights(artifact), artifact.manifest
        folder.mkdir(exist_ok=True)
        for name, define in find_graphs("openvla").items():
            builder, file = PlainBuilder(weights), folder / f"{name}.onnx"
            define(builder, manifest.policy, manifest.towers)
            builder.write(name, file)
            if int8:
                from onnxruntime.quantization import QuantType, quantize_dynamic

                quantize_dynamic(str(file), str(folder / f"{name}.int8.onnx"), weight_type=QuantType.QInt8)
                file = folder / f"{name}.int8.onnx"
            self.sessions[name] = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        session = self.sessions[graph]
        if graph == "decoder" and not inputs["start"][0]:
            names = [node.name for node in session.get_inputs() if node.name.startswith("past.")]
            self.past = {name: np.zeros((1, 16, 0, 64), np.float32) for name in names}
        feeds = {node.name: {**inputs, **self.past}[node.name] for node in session.get_inputs()}
        names = [node.name for node in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        if graph == "decoder":
            self.past = {name: outputs[name.replace("past", "present")] for name in self.past}
        return outputs

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__}
