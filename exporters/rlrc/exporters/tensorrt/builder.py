"""ONNX graphs for TensorRT: standard operators only, opset 21, strongly typed.

Products (linear layers, convolutions, the two of attention) are computed in the format's type, on operands cast to it.
All else is in float32: norms, softmax, rotary positions, and the residual stream, whose large activations 16 bits would
lose. TensorRT fuses the casts with neighbouring operators, and the time outside products is small. Quantization
is explicit: blocked DequantizeLinear of the artifact's 4-bit integers, or QuantizeLinear and DequantizeLinear around
8-bit products of integers or floats (E4M3: 4 bits of exponent, 3 of mantissa, arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from rlrc.compressor.models.storage.scratch import Allocate
from rlrc.exporters.graphs.builder import Activation, Builder, join_names, quantize_columns
from rlrc.exporters.graphs.weights import Weights, to_float16, unpack_nibbles

Float = Literal["float32", "float16", "bfloat16"]
EightBit = Literal["int8", "fp8"]
E4M3_MAX = 448.0
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class TensorRTFormat:
    products: Float
    keep_int4: bool = False
    """4-bit weights stay as they are; otherwise they are widened"""
    scales: Mapping[str, float] = field(default_factory=dict)
    """the scale of the 8-bit input of every product to compute in 8 bits, by the ``join_names`` of its weights"""
    eight: EightBit = "int8"


class TensorRTBuilder(Builder):
    OPSETS: ClassVar = {"": 21}
    IR_VERSION: ClassVar = 10
    MAX_DIMS: ClassVar = 8
    WIDE: ClassVar = "float32"

    def __init__(self, weights: Weights, format: TensorRTFormat, allocate: Allocate | None = None) -> None:
        super().__init__(weights, allocate)
        self.format = format
        self._cast: dict[str, str] = {}

    def table(self, name: str, array: NDArray[np.float32], of: Iterable[str] = ()) -> str:
        return self._store(name, array)

    def embed(self, ids: str, module: str) -> str:
        rows = self._op("Gather", self._store_float(f"{module}.weight", self.weights.values(f"{module}.weight")), ids)
        return rows if self.format.products == "float32" else self.cast(rows, "float32")

    # Layers, in float32

    def layer_norm(self, x: str, module: str, epsilon: float) -> str:
        scale, bias = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        return self._op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        mean = self._op("ReduceMean", self.multiply(x, x), self.integers(-1), keepdims=1)
        root = self._op("Sqrt", self.add(mean, self.scalar(epsilon)))
        return self.multiply(self._op("Div", x, root), weight)

    def activation(self, x: str, kind: Activation) -> str:
        if kind == "silu":
            return self.multiply(x, self._op("Sigmoid", x))
        if kind == "relu":
            return self._op("Relu", x)
        return self._op("Gelu", x, approximate="none" if kind == "gelu" else "tanh")

    def linear_activated(self, x: str, module: str, kind: Activation) -> str:
        return self.activation(self.linear(x, module, bias=True), kind)

    def linear_scaled(self, x: str, module: str, scale: str) -> str:
        factor = self.weights.array(scale)
        bias = self.table(f"{module}.bias:scaled", self.weights.array(f"{module}.bias") * factor)
        return self.add(self.multiply(self._product(x, module), self.table(scale, factor)), bias)

    def rotary(self, x: str, heads: int, tables: tuple[str, str]) -> str:
        x = self.reshape(x, 0, 0, heads, 2, -1)
        first, second = self.slice(x, 0, 1, axis=3), self.slice(x, 1, 2, axis=3)
        cosines, sines = (self.reshape(table, 0, 1, 1, -1) for table in tables)
        turned = (
            self._op("Sub", self.multiply(first, cosines), self.multiply(second, sines)),
            self.add(self.multiply(second, cosines), self.multiply(first, sines)),
        )
        return self.reshape(self.concat(*turned, axis=3), 0, 0, -1)

    def attention(self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int) -> str:
        k, v = (self.transpose(self.reshape(x, 0, 0, kv_heads, head_dim), 0, 2, 1, 3) for x in (k, v))
        return self.attend(q, k, v, heads, kv_heads, head_dim)

    # Products

    def matmul(self, a: str, b: str) -> str:
        return self._widen(self._op("MatMul", self._narrow(a), self._narrow(b)))

    def convolution(
        self, x: str, module: str, scale: NDArray[np.float32], bias: NDArray[np.float32], **shape: Any
    ) -> str:
        weight = self.weights.array(f"{module}.weight") * scale.reshape(-1, 1, 1, 1)
        names = f"{module}.weight", f"{module}.bias"
        if self.format.products != "float16":  # opset 21 has no convolution in bfloat16
            return self._op("Conv", x, self.table(names[0], weight), self.table(names[1], bias), **shape)
        stored = self._store_float(names[0], weight), self._store_float(names[1], bias)
        return self._widen(self._op("Conv", self._narrow(x), *stored, **shape))

    def _product(self, x: str, *modules: str) -> str:
        names = [f"{module}.weight" for module in modules]
        kinds = {self._keeps_4_bits(name) for name in names}
        if len(kinds) > 1:  # layers stored differently need separate products
            return self.concat(*(self._product(x, module) for module in modules), axis=-1)
        if kinds == {True}:
            return self._widen(self._op("MatMul", self._narrow(x), self._store_4_bits(names)))
        name = join_names(names)
        matrix = np.concatenate([self.weights.values(each) for each in names]).T  # (in, out)
        if name in self.format.scales:
            return self._op(
                "MatMul", self._round_activations(x, self.format.scales[name]), self._store_8_bits(name, matrix)
            )
        return self._widen(self._op("MatMul", self._narrow(x), self._store_float(name, matrix)))

    def _keeps_4_bits(self, name: str) -> bool:
        """Whether the file gets the artifact's 4-bit integers; TensorRT needs an even number of outputs for them."""
        return self.format.keep_int4 and self.weights.bits(name) == 4 and self.weights.shape(name)[0] % 2 == 0

    def _store_4_bits(self, names: list[str]) -> str:
        """The artifact's integers (in, out), with a scale for every group of inputs: (in / group, out)."""
        name, (integers, scales) = join_names(names), self.weights.read_packed(names)
        signed = unpack_nibbles(integers).T ^ 8
        packed = signed[:, 0::2] | signed[:, 1::2] << 4
        self._store_as(f"{name}.q", TensorProto.INT4, signed.shape, packed)
        # TensorRT refuses the scale 0 of a group of zeros; any other scale gives the same values.
        scale = self._store_float(f"{name}.scale", np.where(scales == 0, 1, scales).astype(np.float32).T)
        # Scales may be negative. TensorRT's parser refuses these as direct constants, but not behind an Identity.
        scale = self._op("Identity", scale)
        group = self.weights.shape(names[0])[1] // scales.shape[1]
        return self._op("DequantizeLinear", f"{name}.q", scale, axis=0, block_size=group)

    def _round_activations(self, x: str, step: float) -> str:
        """Round x to 8 bits and back."""
        scale, zero = self.constant(np.array(step, np.float32)), self.constant(np.zeros((), np.int8))
        if self.format.eight == "fp8":
            zero = self._store_as("zero:e4m3", TensorProto.FLOAT8E4M3FN, (), np.zeros((), np.uint8))
        return self._op("DequantizeLinear", self._op("QuantizeLinear", x, scale, zero), scale, zero)

    def _store_8_bits(self, name: str, matrix: NDArray[np.float32]) -> str:
        """8-bit weights: integers with a scale for every output, or floats with one scale for all."""
        if self.format.eight == "fp8":
            numbers, one = quantize_e4m3(matrix)
            stored = self._store_as(f"{name}.q", TensorProto.FLOAT8E4M3FN, matrix.shape, numbers)
            return self._op("DequantizeLinear", stored, self.constant(np.array(one, np.float32)))
        integers, scale = quantize_columns(matrix)
        return self._op("DequantizeLinear", self._store(f"{name}.q", integers), self.constant(scale), axis=1)

    # Types

    def _narrow(self, x: str) -> str:
        """x in the type of products, cast once for all its readers."""
        if self.format.products == "float32":
            return x
        if x not in self._cast:
            self._cast[x] = self._op("Cast", x, to=TYPES[self.format.products])
        return self._cast[x]

    def _widen(self, x: str) -> str:
        return x if self.format.products == "float32" else self.cast(x, "float32")

    def _store_float(self, name: str, array: NDArray[np.float32]) -> str:
        """A constant in the type of products."""
        if self.format.products == "bfloat16":
            bits = torch.from_numpy(np.ascontiguousarray(array)).bfloat16().view(torch.int16).numpy()
            return self._store_as(name, TensorProto.BFLOAT16, array.shape, bits)
        return self._store(name, array if self.format.products == "float32" else to_float16(name, array, "bf16"))


def quantize_e4m3(matrix: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float]:
    """Weights as 8-bit floats (bytes of the same shape), and their scale: the largest magnitude becomes 448."""
    one = max(float(np.abs(matrix).max()) / E4M3_MAX, float(np.finfo(np.float32).tiny))
    numbers = torch.from_numpy(np.ascontiguousarray(matrix)) / one
    bits: NDArray[np.uint8] = numbers.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return bits, one
