"""ONNX graphs for ONNX Runtime: fused operators, int4 and int8 products, storage of weights.

``OnnxRuntimeBuilder`` makes all choices of operators; each was the fastest in measurements among those that run on
onnxruntime 1.18 and later (docs/decisions).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rlrc.compressor.models.storage.scratch import Allocate
from rlrc.exporters.graphs.builder import INT8_MIN_INPUTS, Activation, Builder, join_names, quantize_columns
from rlrc.exporters.graphs.weights import Weights, to_float16

NEEDS = {"onnxruntime": ">=1.18"}
CONTRIB = "com.microsoft"
ACCURACY = {"int4": 0, "int4a8": 4}  # of MatMulNBits: 0 computes in float32
LARGE_TABLE = 2**20


@dataclass(frozen=True)
class OnnxFormat:
    """How weights are stored, and how linear layers are computed."""

    store: type[np.float32] | type[np.float16]
    """float16 holds bfloat16 weights above 6e-5 exactly; a Cast to float32 is folded by ONNX Runtime at load"""
    products: Literal["float", "int8", "int4", "int4a8"]
    """int4: products of 4-bit weights in MatMulNBits, others in floats, widened at load. int4a8: the same with
    activations rounded to 8 bits in blocks of 32, and 8-bit weights in 8-bit products with a scale for each row"""
    packed: bool = False
    """for int8: the file has the quantized weights as they are; unpacking at load takes about 40 bytes a weight for a
    while. Otherwise the file has the 8-bit integers of the products"""
    rows: bool = False
    """for int8: activations have a scale for each row instead of one for all"""


FORMATS = {
    "fp32": OnnxFormat(np.float32, "float"),
    "fp16": OnnxFormat(np.float16, "float"),
    "int8": OnnxFormat(np.float16, "int8"),
    "int8-rows": OnnxFormat(np.float16, "int8", rows=True),
    "int4": OnnxFormat(np.float16, "int4"),
    "int4a8": OnnxFormat(np.float16, "int4a8"),
    "w4a8": OnnxFormat(np.float16, "int8", packed=True),  # int4 in the file, 8 bits in memory and in products
    "w8": OnnxFormat(np.float16, "int4"),  # 8 bits in the file, 4 where the weights have 4
}


class OnnxRuntimeBuilder(Builder):
    OPSETS: ClassVar = {"": 20, CONTRIB: 1}
    IR_VERSION: ClassVar = 9
    WIDE: ClassVar = "float64"

    def __init__(self, weights: Weights, format: OnnxFormat, allocate: Allocate | None = None) -> None:
        super().__init__(weights, allocate)
        self.format = format
        self._ends: tuple[str, str] | None = None
        """the last position of every observation and their number, shared by all blocks"""
        self.memory = 0
        """bytes of the products' weights once loaded: 4 bits with float32 scales, 8 bits, or float32"""

    def table(self, name: str, array: NDArray[np.float32], of: Iterable[str] = ()) -> str:
        if self.format.store is np.float32 or not self.weights.exact.isdisjoint((name, *of)):
            return self._store(name, array)
        value = f"{name}:f"
        if name not in self._initializers:
            self._op("Cast", self._store(name, to_float16(name, array, "fp32")), to=TensorProto.FLOAT, out=value)
        return value

    def embed(self, ids: str, module: str) -> str:
        """Look up rows of a table; only a small table is widened to float32 as a whole."""
        name = f"{module}.weight"
        if self.weights.bits(name) is not None:
            return self._embed_8_bits(ids, name)
        if self.format.store is np.float32 or np.prod(self.weights.shape(name)) < LARGE_TABLE:
            return self._op("Gather", self.weight(name), ids)
        narrow = self._store(name, to_float16(name, self.weights.array(name), "fp32"))
        return self.cast(self._op("Gather", narrow, ids), "float32")

    def _embed_8_bits(self, ids: str, name: str) -> str:
        """Look up rows of an 8-bit table and widen only these."""
        integers, scales = self.weights.read_packed([name])
        width, groups = integers.shape[1], scales.shape[1]
        rows = self._op("Gather", self._store(f"{name}.q", integers.reshape(-1, groups, width // groups)), ids)
        scale = self._op("Gather", self._store(f"{name}.scale", scales[..., None]), ids)
        values = self.multiply(self.cast(rows, "float32"), self.cast(scale, "float32"))
        return self.reshape(values, 0, 0, width)

    def layer_norm(self, x: str, module: str, epsilon: float) -> str:
        """Not fused with the addition before it: SkipLayerNormalization takes three times as long as the two."""
        scale, bias = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        return self._op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        # ONNX Runtime's own operator, in the default domain; the standard's RMSNormalization came with opset 23.
        return self._op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)

    def activation(self, x: str, kind: Activation) -> str:
        if kind == "silu":
            return self._op("QuickGelu", x, domain=CONTRIB, alpha=1.0)
        if kind == "relu":
            return self._op("Relu", x)
        return self._op("Gelu" if kind == "gelu" else "FastGelu", x, domain=CONTRIB)

    def linear_activated(self, x: str, module: str, kind: Activation) -> str:
        if kind in ("gelu", "gelu-tanh"):  # fused with the bias by ONNX Runtime
            bias = self.weight(f"{module}.bias")
            return self._op("BiasGelu" if kind == "gelu" else "FastGelu", self.linear(x, module), bias, domain=CONTRIB)
        return self.activation(self.linear(x, module, bias=True), kind)

    def rotary(self, x: str, heads: int, tables: tuple[str, str]) -> str:
        return self._op("RotaryEmbedding", x, self.integers(0), *tables, domain=CONTRIB, num_heads=heads)

    def attention(self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int) -> str:
        if kv_heads != heads:
            k, v = (self._repeat_heads(x, heads, kv_heads, head_dim) for x in (k, v))
        return self._op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=heads)

    def matmul(self, a: str, b: str) -> str:
        return self._op("MatMul", a, b)

    def convolution(
        self, x: str, module: str, scale: NDArray[np.float32], bias: NDArray[np.float32], **shape: Any
    ) -> str:
        weight = self.multiply(self.weight(f"{module}.weight"), self.constant(scale.reshape(-1, 1, 1, 1)))
        return self._op("Conv", x, weight, self.constant(bias), **shape)

    def has_cached_attention(self, head_dim: int) -> bool:
        return head_dim % 16 == 0  # required by the rotation in GroupQueryAttention

    def cached_attention(
        self, qkv: str, past: tuple[str, str], start: str, tables: tuple[str, str], heads: int, kv_heads: int
    ) -> tuple[str, tuple[str, str]]:
        if self._ends is None:
            total = self._op("Cast", self.add(start, self.size(qkv, 1)), to=TensorProto.INT32)
            last = self._op("Sub", total, self.constant(np.array([1], np.int32)))
            self._ends = self._op("Expand", last, self.size(qkv, 0)), total
        outputs = [self._name() for _ in range(3)]
        sizes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}
        inputs = [qkv, "", "", *past, *self._ends, *tables]
        self._nodes.append(helper.make_node("GroupQueryAttention", inputs, outputs, domain=CONTRIB, **sizes))
        return outputs[0], (outputs[1], outputs[2])

    def linear_scaled(self, x: str, module: str, scale: str) -> str:
        factor, weight = self.weight(scale), f"{module}.weight"
        bias = self.multiply(self.weight(f"{module}.bias"), factor)
        if self.format.products == "float":  # a product of constants is computed at load
            matrix = np.ascontiguousarray(self.weights.array(weight).T)
            return self.add(self._op("MatMul", x, self.multiply(self.table(weight, matrix), factor)), bias)
        return self.add(self.multiply(self._product(x, module), factor), bias)

    # How products are computed

    def linears(self, x: str, *modules: str) -> list[str]:
        """One product if all weights have the same bits: waking the threads for each takes 5 % of a token's time."""
        names = [f"{module}.weight" for module in modules]
        if len({self.weights.bits(name) for name in names}) > 1:
            return super().linears(x, *modules)
        return self.split(self.linear(x, *modules), *(self.weights.shape(name)[0] for name in names))

    def _product(self, x: str, *modules: str) -> str:
        names = [f"{module}.weight" for module in modules]
        bits = {self.weights.bits(name) for name in names}
        size = sum(prod(self.weights.shape(name)) for name in names)
        in_4_bits = self.format.products in ACCURACY and bits == {4}
        in_8_bits = self.format.products == "int8" or (self.format.products == "int4a8" and bits == {8})
        self.memory += size * 5 // 8 if in_4_bits else size if in_8_bits else 4 * size
        if in_4_bits:
            return self._int4_product(x, names)
        if bits == {None} or (in_8_bits and not self.format.packed):
            matrix = np.concatenate([self.weights.values(name) for name in names]).T  # (in, out)
            if in_8_bits and len(matrix) >= INT8_MIN_INPUTS:
                return self._int8_product(x, *self._quantize_int8(join_names(names), matrix))
            return self._op("MatMul", x, self.table(join_names(names), np.ascontiguousarray(matrix), names))
        folded = self._op("Transpose", self.concat(*map(self._unpack, names), axis=0), perm=(1, 0))
        if in_8_bits:
            return self._int8_product(x, *self._fold_int8(folded, sum(self.weights.shape(name)[0] for name in names)))
        return self._op("MatMul", x, folded)

    def _int4_product(self, x: str, names: list[str]) -> str:
        """MatMulNBits on the artifact's integers, which have its layout: pairs with the low nibble first, offset 8."""
        integers, scales = self.weights.read_packed(names)
        outputs, inputs = len(integers), integers.shape[1] * 2
        group = inputs // scales.shape[1]
        blocks = self._store(f"{join_names(names)}.q", integers.reshape(outputs, inputs // group, group // 2))
        scale = self.table(f"{join_names(names)}.scale", scales.reshape(-1).astype(np.float32))
        shape = {
            "K": inputs,
            "N": outputs,
            "bits": 4,
            "block_size": group,
            "accuracy_level": ACCURACY[self.format.products],
        }
        return self._op("MatMulNBits", x, blocks, scale, domain=CONTRIB, **shape)

    def _int8_product(self, x: str, integers: str, scale: str) -> str:
        """An 8-bit product: activations are quantized at run time, weights (in, out) have a scale for each output.

        The operator has one scale for all rows. Language models have rows a thousand times as large as others (arXiv
        2402.17762), which would round the others to zero. With ``rows``, each row is first scaled to a maximum of 1;
        this takes a twelfth of the time of a long prompt, but half of that of the reference policy's 22 rows. Weights
        are scaled by ``find_largest_pairs``, so that the products are the same integers on every processor.
        """
        zero = self.constant(np.zeros((), np.int8))
        if not self.format.rows and self.format.products == "int8":
            return self._op("DynamicQuantizeMatMul", x, integers, scale, zero, domain=CONTRIB)
        largest = self._op("ReduceMax", self._op("Abs", x), self.integers(-1), keepdims=1)
        largest = self._op("Max", largest, self.constant(np.array(np.finfo(np.float32).tiny)))
        rows = self._op("Div", x, largest)
        return self.multiply(self._op("DynamicQuantizeMatMul", rows, integers, scale, zero, domain=CONTRIB), largest)

    def _quantize_int8(self, name: str, matrix: NDArray[np.float32]) -> tuple[str, str]:
        integers, scale = quantize_columns(matrix, find_largest_pairs(matrix))
        return self._store(f"{name}.q", integers), self.constant(scale)

    # ONNX Runtime computes what depends on constants only once, at load: the file keeps the packed integers.

    def _fold_int8(self, matrix: str, outputs: int) -> tuple[str, str]:
        """``_quantize_int8`` as operators; grouped weights always have an even number of inputs."""
        sums = self._op("ReduceSum", self.reshape(matrix, -1, 2, outputs), self.integers(1), keepdims=0)
        both = self.concat(matrix, sums, axis=0)
        largest = self._op("ReduceMax", self._op("Abs", both), self.integers(0), keepdims=0)
        tiny = self.constant(np.array(np.finfo(np.float32).tiny))
        scale = self._op("Max", self._op("Div", largest, self.constant(np.array(127, np.float32))), tiny)
        return self._op("Cast", self._op("Round", self._op("Div", matrix, scale)), to=TensorProto.INT8), scale

    def _unpack(self, name: str) -> str:
        """Dequantize a tensor to float32 (out, in), as operators."""
        integers, scales = self.weights.read_packed([name])
        stored = self._store(f"{name}.q", integers)
        outputs, groups = scales.shape
        if self.weights.bits(name) == 4:
            low = self._op("BitwiseAnd", stored, self.constant(np.array(15, np.uint8)))
            high = self._op("BitShift", stored, self.constant(np.array(4, np.uint8)), direction="RIGHT")
            pairs = [self.reshape(nibbles, outputs, -1, 1) for nibbles in (low, high)]
            offset = self.constant(np.array(8, np.float32))
            values = self._op("Sub", self._op("Cast", self.concat(*pairs, axis=2), to=TensorProto.FLOAT), offset)
        else:
            values = self._op("Cast", stored, to=TensorProto.FLOAT)
        scale = self.table(f"{name}.scale", scales.astype(np.float32)[..., None])
        return self.reshape(self._op("Mul", self.reshape(values, outputs, groups, -1), scale), outputs, -1)

    def _repeat_heads(self, x: str, heads: int, kv_heads: int, head_dim: int) -> str:
        times = self.integers(1, 1, 1, heads // kv_heads, 1)
        repeated = self._op("Expand", self.reshape(x, 0, 0, kv_heads, 1, head_dim), times)
        return self.reshape(repeated, 0, 0, heads * head_dim)


def find_largest_pairs(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """For weights (in, out) -> (out,): the largest of |a|, |b| and |a + b| over the pairs of inputs 2i and 2i + 1.

    x86-64 processors without VNNI multiply unsigned activations (up to 255) by signed weights two inputs at a time and
    add both products in saturating 16-bit integers (vpmaddubsw). If this value becomes 127, no two rounded weights of a
    pair sum to more than 128, and 255 x 128 fits.
    """
    even = len(matrix) // 2 * 2
    sums = np.abs(matrix[0:even:2] + matrix[1:even:2]).max(0, initial=0)
    largest: NDArray[np.float32] = np.maximum(np.abs(matrix).max(0), sums)
    return largest
