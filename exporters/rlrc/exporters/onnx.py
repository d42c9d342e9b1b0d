"""Builds ONNX graphs for ONNX Runtime by hand: its fused operators, its int4 and int8 products, how weights are stored.

By hand rather than traced by torch.onnx, which takes a minute where this takes a moment, and leaves norms, rotary
positions, attention and 4-bit products as dozens of small operators. All choices of operators are in ``Builder``; each
was the fastest of those measured that run on onnxruntime 1.18 and later (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rlrc.artifact import QuantizationSpec, TensorSpec
from rlrc.errors import UserError

OPSET, IR_VERSION = 20, 9
NEEDS = {"onnxruntime": ">=1.18"}
CONTRIB = "com.microsoft"
INT4_ACCURACY_LEVEL = 0  # products in float32: as fast as 8-bit activations (level 4) at these lengths, and exact
LARGE_TABLE = 2**20
INT8_MIN_INPUTS = 32  # narrower products (the state's) keep floats: one scale for all of a few unlike numbers is coarse
TYPES = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "int64": TensorProto.INT64}
Activation = Literal["silu", "gelu", "gelu-tanh", "relu"]


@dataclass(frozen=True)
class Flavour:
    """How weights are stored, and how linear layers are computed."""

    store: type[np.float32] | type[np.float16]
    """float16 holds bfloat16 weights above 6e-5 exactly; a Cast, which ONNX Runtime folds at load, restores float32"""
    products: Literal["float", "int8", "int4"]
    """int4: in 4 bits where the weights have them (MatMulNBits), else in floats, widened at load"""


FLAVOURS = {
    "fp32": Flavour(np.float32, "float"),
    "fp16": Flavour(np.float16, "float"),
    "int8": Flavour(np.float16, "int8"),
    "int4": Flavour(np.float16, "int4"),
    "w4a8": Flavour(np.float16, "int8"),  # int4 in the file, 8 bits in memory and in products
    "w8": Flavour(np.float16, "int4"),  # 8 bits in the file, but for what has 4
}
DENSE = ("fp16", "fp32", "int8")  # for float weights, the default first
QUANTIZED = {"int4": ("int4", "w4a8"), "int8": ("w8", "int8")}  # for quantized weights, by the grid of most of them


@dataclass(frozen=True)
class Weights:
    """An artifact's tensors as stored: floats under their own names, quantized ones as NAME.q and NAME.scale."""

    tensors: dict[str, NDArray[Any]]
    quantization: QuantizationSpec | None
    exact: frozenset[str] = frozenset()
    """what is stored in float32 because less would change it; graphs keep it so"""

    def bits(self, name: str) -> int | None:
        """Bits of a quantized tensor, None for floats."""
        return None if self.quantization is None else self.quantization.tensors.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the tensor, quantized or not."""
        if (bits := self.bits(name)) is None:
            return self.tensors[name].shape
        rows, columns = self.tensors[f"{name}.q"].shape
        return rows, columns * 8 // bits

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by the names of the policy."""
        listed = {} if self.quantization is None else self.quantization.tensors
        quantized = [name for name in listed if self.tensors.keys() >= {f"{name}.q", f"{name}.scale"}]
        packed = {f"{name}.{part}" for name in quantized for part in ("q", "scale")}
        return {name: self.shape(name) for name in (*quantized, *(self.tensors.keys() - packed))}

    def array(self, name: str) -> NDArray[np.float32]:
        """A tensor that is not quantized."""
        return self.tensors[name].astype(np.float32)

    def packed(self, names: Iterable[str]) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Integers and scales of quantized tensors of the same bits, joined along the outputs."""
        names = list(names)
        integers = np.concatenate([self.tensors[f"{name}.q"] for name in names])
        return integers, np.concatenate([self.tensors[f"{name}.scale"] for name in names])


class Builder:
    """A graph under construction. Methods take and return names of values; activations are (batch, rows, channels)."""

    def __init__(self, weights: Weights, flavour: Flavour) -> None:
        self.weights, self.flavour = weights, flavour
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._values = 0

    # The graph's interface

    def input(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
        self.inputs.append(TensorSpec(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: str, shape: tuple[int | str, ...]) -> None:
        """Names a value, which other operators may read too."""
        self.outputs.append(TensorSpec(name, dtype, shape))
        for node in self._nodes:
            for values in (node.input, node.output):
                values[:] = [name if each == value else each for each in values]

    def bytes(self) -> int:
        """Of all constants."""
        return sum(len(tensor.raw_data) for tensor in self._initializers.values())

    def model(self, name: str) -> onnx.ModelProto:
        def declared(tensors: list[TensorSpec]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.shape) for spec in tensors]

        nodes, initializers = self._needed()
        graph = helper.make_graph(nodes, name, declared(self.inputs), declared(self.outputs), initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rlrc")

    def _needed(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """What the outputs depend on.

        onnxruntime 1.18 goes wrong from the second run on if a graph computes what nobody reads.
        """
        nodes, read = list[onnx.NodeProto](), {tensor.name for tensor in self.outputs}
        for node in reversed(self._nodes):
            if not read.isdisjoint(node.output):
                nodes.append(node)
                read.update(node.input)
        return nodes[::-1], [tensor for name, tensor in self._initializers.items() if name in read]

    # Constants

    def constant(self, array: NDArray[Any]) -> str:
        """Stored as it is; equal ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._store(f"c{len(self._constants)}", array)
        return self._constants[key]

    def table(self, name: str, array: NDArray[np.float32], of: Iterable[str] = ()) -> str:
        """A float32 constant stored in the flavour's precision under this name. ``of``: tensors joined in it."""
        if self.flavour.store is np.float32 or not self.weights.exact.isdisjoint((name, *of)):
            return self._store(name, array)
        value = f"{name}:f"
        if name not in self._initializers:
            self._op("Cast", self._store(name, self._narrow(name, array)), to=TensorProto.FLOAT, out=value)
        return value

    def _narrow(self, name: str, array: NDArray[np.float32]) -> NDArray[np.float16]:
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise UserError(
                f"expected {name} within float16's range, found {np.abs(array).max():.3g}; use --precision fp32"
            )
        return narrow

    def weight(self, name: str) -> str:
        return self.table(name, self.weights.array(name))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    # Moving data

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a dimension."""
        return self._op("Reshape", x, self.integers(*shape))

    def transpose(self, x: str, *axes: int) -> str:
        return self._op("Transpose", x, perm=axes)

    def concat(self, *values: str, axis: int = 1) -> str:
        return self._op("Concat", *values, axis=axis)

    def split(self, x: str, *sizes: int) -> list[str]:
        """Parts of the last axis."""
        outputs = [self._name() for _ in sizes]
        self._nodes.append(helper.make_node("Split", [x, self.constant(np.array(sizes, np.int64))], outputs, axis=-1))
        return outputs

    def last_rows(self, x: str, rows: int, axis: int = 1) -> str:
        return self.slice(x, -rows, None, axis)

    def cast(self, x: str, dtype: str) -> str:
        return self._op("Cast", x, to=TYPES[dtype])

    def slice(self, x: str, start: int, end: int | None, axis: int = 1) -> str:
        last = np.iinfo(np.int64).max if end is None else end
        return self._op("Slice", x, *map(self.integers, (start, last, axis)))

    def size(self, x: str, axis: int) -> str:
        """How long x is along an axis, int64 (1,)."""
        return self._op("Shape", x, start=axis, end=axis + 1)

    def repeat(self, name: str, batch_of: str) -> str:
        """A weight (rows, channels) -> (batch, rows, channels)."""
        shape = self.concat(self.size(batch_of, 0), self.integers(1, 1), axis=0)
        return self._op("Expand", self.weight(name), shape)

    def embed(self, ids: str, module: str) -> str:
        """Rows of a table, which is widened to float32 as a whole only if it is small."""
        name = f"{module}.weight"
        if self.weights.bits(name) is not None:
            return self._embed_int8(ids, name)
        if self.flavour.store is np.float32 or np.prod(self.weights.shape(name)) < LARGE_TABLE:
            return self._op("Gather", self.weight(name), ids)
        narrow = self._store(name, self._narrow(name, self.weights.array(name)))
        return self.cast(self._op("Gather", narrow, ids), "float32")

    def _embed_int8(self, ids: str, name: str) -> str:
        """Rows of a table in 8 bits: only those that are looked up are widened."""
        integers, scales = self.weights.packed([name])
        width, groups = integers.shape[1], scales.shape[1]
        rows = self._op("Gather", self._store(f"{name}.q", integers.reshape(-1, groups, width // groups)), ids)
        scale = self._op("Gather", self._store(f"{name}.scale", scales[..., None]), ids)
        values = self.multiply(self.cast(rows, "float32"), self.cast(scale, "float32"))
        return self.reshape(values, 0, 0, width)

    # Layers

    def add(self, a: str, b: str) -> str:
        return self._op("Add", a, b)

    def multiply(self, a: str, b: str) -> str:
        return self._op("Mul", a, b)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Any operator of the standard."""
        return self._op(kind, *inputs, **attributes)

    def layer_norm(self, x: str, module: str, epsilon: float) -> str:
        """Apart from the addition before it: SkipLayerNormalization takes three times as long as the two."""
        scale, bias = self.weight(f"{module}.weight"), self.weight(f"{module}.bias")
        return self._op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        """``weight`` is a value, not a name."""
        # ONNX Runtime's own operator, in the default domain; the standard's RMSNormalization came with opset 23.
        return self._op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)

    def activation(self, x: str, kind: Activation) -> str:
        if kind == "silu":
            return self._op("QuickGelu", x, domain=CONTRIB, alpha=1.0)
        if kind == "relu":
            return self._op("Relu", x)
        return self._op("Gelu" if kind == "gelu" else "FastGelu", x, domain=CONTRIB)

    def linear_activated(self, x: str, module: str, kind: Activation) -> str:
        """The activation of a linear layer with bias."""
        if kind in ("gelu", "gelu-tanh"):  # ONNX Runtime adds the bias on the way
            bias = self.weight(f"{module}.bias")
            return self._op("BiasGelu" if kind == "gelu" else "FastGelu", self.linear(x, module), bias, domain=CONTRIB)
        return self.activation(self.linear(x, module, bias=True), kind)

    def rotary(self, x: str, heads: int, tables: tuple[str, str], start: int = 0) -> str:
        """Rotates rows at positions from ``start``; ``tables`` are cosines and sines (positions, head_dim / 2)."""
        position = self.integers(start)
        return self._op("RotaryEmbedding", x, position, *tables, domain=CONTRIB, num_heads=heads)

    def attention(self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int) -> str:
        """Bidirectional softmax attention: q has heads * head_dim channels, k and v kv_heads * head_dim (own rows).

        With a mask or a past: rlrc.exporters.graphs.blocks.
        """
        if kv_heads != heads:
            k, v = (self._repeat_heads(x, heads, kv_heads, head_dim) for x in (k, v))
        return self._op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=heads)

    def linear(self, x: str, *modules: str, bias: bool = False) -> str:
        """Linear layers of one input as one product: their outputs side by side. ``bias`` allows a single module."""
        y = self._product(x, *modules)
        if bias:
            (module,) = modules
            y = self.add(y, self.weight(f"{module}.bias"))
        return y

    def linear_scaled(self, x: str, module: str, scale: str) -> str:
        """A linear layer with bias, its outputs multiplied by a weight of the policy (LayerScale)."""
        factor, weight = self.weight(scale), f"{module}.weight"
        bias = self.multiply(self.weight(f"{module}.bias"), factor)
        if self.flavour.products == "float":  # folded: a product of constants is computed at load
            matrix = np.ascontiguousarray(self.weights.array(weight).T)
            return self.add(self._op("MatMul", x, self.multiply(self.table(weight, matrix), factor)), bias)
        return self.add(self.multiply(self._product(x, module), factor), bias)

    # How products are computed

    def _product(self, x: str, *modules: str) -> str:
        names = [f"{module}.weight" for module in modules]
        bits = {self.weights.bits(name) for name in names}
        if self.flavour.products == "int4" and bits == {4}:
            return self._int4_product(x, names)
        if bits == {None}:
            matrix = np.concatenate([self.weights.array(name) for name in names]).T  # (in, out)
            if self.flavour.products == "int8" and len(matrix) >= INT8_MIN_INPUTS:
                return self._int8_product(x, *self._int8(_joined(names), matrix))
            return self._op("MatMul", x, self.table(_joined(names), np.ascontiguousarray(matrix), names))
        folded = self._op("Transpose", self.concat(*map(self._unpacked, names), axis=0), perm=(1, 0))
        if self.flavour.products == "int8":
            return self._int8_product(x, *self._folded_int8(folded))
        return self._op("MatMul", x, folded)

    def _int4_product(self, x: str, names: list[str]) -> str:
        """The artifact's own integers: MatMulNBits stores pairs in the same order, low nibble first, offset 8."""
        assert self.weights.quantization is not None
        group = self.weights.quantization.group
        integers, scales = self.weights.packed(names)
        outputs, inputs = len(integers), integers.shape[1] * 2
        blocks = self._store(f"{_joined(names)}.q", integers.reshape(outputs, inputs // group, group // 2))
        scale = self.table(f"{_joined(names)}.scale", scales.reshape(-1).astype(np.float32))
        shape = {"K": inputs, "N": outputs, "bits": 4, "block_size": group, "accuracy_level": INT4_ACCURACY_LEVEL}
        return self._op("MatMulNBits", x, blocks, scale, domain=CONTRIB, **shape)

    def _int8_product(self, x: str, integers: str, scale: str) -> str:
        """Activations are quantized as they come, with one scale; weights (in, out) have one for each output."""
        zero = self.constant(np.zeros((), np.int8))
        return self._op("DynamicQuantizeMatMul", x, integers, scale, zero, domain=CONTRIB)

    def _int8(self, name: str, matrix: NDArray[np.float32]) -> tuple[str, str]:
        scale = np.maximum(np.abs(matrix).max(0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        integers = np.rint(matrix / scale).astype(np.int8)
        return self._store(f"{name}.q", integers), self.constant(scale)

    # What is computed from constants alone, ONNX Runtime computes once, at load: the file keeps the packed integers.

    def _folded_int8(self, matrix: str) -> tuple[str, str]:
        """``_int8`` as operators."""
        largest = self._op("ReduceMax", self._op("Abs", matrix), self.integers(0), keepdims=0)
        tiny = self.constant(np.array(np.finfo(np.float32).tiny))
        scale = self._op("Max", self._op("Div", largest, self.constant(np.array(127, np.float32))), tiny)
        return self._op("Cast", self._op("Round", self._op("Div", matrix, scale)), to=TensorProto.INT8), scale

    def _unpacked(self, name: str) -> str:
        """A quantized tensor -> float32 (out, in)."""
        integers, scales = self.weights.packed([name])
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

    def _store(self, name: str, array: NDArray[Any]) -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def _op(self, kind: str, *inputs: str, domain: str = "", out: str | None = None, **attributes: Any) -> str:
        value = out or self._name()
        self._nodes.append(helper.make_node(kind, inputs, [value], domain=domain, **attributes))
        return value

    def _name(self) -> str:
        self._values += 1
        return f"v{self._values}"


def _joined(names: list[str]) -> str:
    """One name for tensors of one module: a.q.weight, a.k.weight -> a.q+k.weight."""
    first, *others = (name.removesuffix(".weight") for name in names)
    return "+".join([first, *(other.rpartition(".")[2] for other in others)]) + ".weight"
