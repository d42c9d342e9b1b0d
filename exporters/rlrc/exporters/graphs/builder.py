"""Build ONNX graphs by hand: values, constants, inputs and outputs, data movement.

torch.onnx would take a minute instead of a moment to trace a graph, and would leave norms, rotary positions, attention
and 4-bit products as dozens of small operators. Graphs are written in terms of ``Builder`` (rlrc.exporters.graphs). Its
subclasses choose the operators that an engine runs fastest, and how weights are stored (rlrc.exporters.onnx.builder,
rlrc.exporters.tensorrt.builder).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rlrc.artifact import TensorSpec
from rlrc.compressor.models.storage.scratch import Allocate
from rlrc.exporters.graphs.constants import Constant, flatten, write_constants
from rlrc.exporters.graphs.weights import Weights

TYPES = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "int64": TensorProto.INT64}
LARGE = 2**30
INT8_MIN_INPUTS = 32  # narrower products (the state's) stay in floats: one scale for a few unlike numbers is coarse
Activation = Literal["silu", "gelu", "gelu-tanh", "relu"]


class Builder(ABC):
    """A graph under construction. Methods take and return names of values; activations are (batch, rows, channels)."""

    OPSETS: ClassVar[dict[str, int]]
    """by domain; "" is the standard's"""
    IR_VERSION: ClassVar[int]
    MAX_DIMS: ClassVar[int] = 64
    WIDE: ClassVar[str]
    """the widest float type that the engine computes in"""

    def __init__(self, weights: Weights, allocate: Allocate | None = None) -> None:
        """``allocate`` makes room for large constants."""
        self.weights, self.allocate = weights, allocate
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, Constant] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._values = 0

    # The graph's interface

    def input(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
        self.inputs.append(TensorSpec(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: str, shape: tuple[int | str, ...]) -> None:
        """Make a value an output of this name; other operators may still read it."""
        self.outputs.append(TensorSpec(name, dtype, shape))
        for node in self._nodes:
            for values in (node.input, node.output):
                values[:] = [name if each == value else each for each in values]

    def bytes(self) -> int:
        """Bytes of all constants."""
        return sum(constant.data.nbytes for constant in self._initializers.values())

    def model(self, name: str, file: str = "", offsets: Mapping[str, int] | None = None) -> onnx.ModelProto:
        """The graph; constants with ``offsets`` are in the ``file`` beside it."""

        def declare(tensors: list[TensorSpec]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.shape) for spec in tensors]

        nodes, constants = self._drop_unused()
        graph = helper.make_graph(nodes, name, declare(self.inputs), declare(self.outputs))
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.IR_VERSION, producer_name="rlrc")
        for constant in constants:  # added last: make_graph and make_model copy what they are given
            constant.fill(model.graph.initializer.add(), file, (offsets or {}).get(constant.name))
        return model

    def write(self, name: str, path: Path) -> None:
        """Write one file, and PATH.data with the constants if they approach protobuf's limit of 2 GB."""
        data, offsets = path.with_name(f"{path.name}.data"), None
        if self.bytes() >= LARGE:
            offsets = write_constants(self._drop_unused()[1], data)
        path.write_bytes(self.model(name, data.name, offsets).SerializeToString(deterministic=True))

    def _drop_unused(self) -> tuple[list[onnx.NodeProto], list[Constant]]:
        """The nodes and constants that the outputs depend on.

        onnxruntime 1.18 gives wrong results from the second run on if a graph computes values that are never read.
        """
        nodes, read = list[onnx.NodeProto](), {tensor.name for tensor in self.outputs}
        for node in reversed(self._nodes):
            if not read.isdisjoint(node.output):
                nodes.append(node)
                read.update(node.input)
        return nodes[::-1], [constant for name, constant in self._initializers.items() if name in read]

    # Constants

    def constant(self, array: NDArray[Any]) -> str:
        """A constant stored unchanged; equal constants are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._store(f"c{len(self._constants)}", array)
        return self._constants[key]

    @abstractmethod
    def table(self, name: str, array: NDArray[np.float32], of: Iterable[str] = ()) -> str:
        """A float32 constant, stored in the builder's format under this name. ``of``: names of the tensors in it."""

    def weight(self, name: str) -> str:
        return self.table(name, self.weights.array(name))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    # Moving data

    def reshape(self, x: str, *shape: int) -> str:
        """In ``shape``, 0 keeps a dimension."""
        return self._op("Reshape", x, self.integers(*shape))

    def transpose(self, x: str, *axes: int) -> str:
        return self._op("Transpose", x, perm=axes)

    def concat(self, *values: str, axis: int = 1) -> str:
        return self._op("Concat", *values, axis=axis)

    def split(self, x: str, *sizes: int) -> list[str]:
        """Split the last axis into parts of these sizes."""
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
        """The size of x along an axis, int64 (1,)."""
        return self._op("Shape", x, start=axis, end=axis + 1)

    def repeat(self, x: str, batch_of: str) -> str:
        """Repeat (rows, channels) for every observation of the batch: (batch, rows, channels)."""
        shape = self.concat(self.size(batch_of, 0), self.integers(1, 1), axis=0)
        return self._op("Expand", x, shape)

    # Layers

    def add(self, a: str, b: str) -> str:
        return self._op("Add", a, b)

    def multiply(self, a: str, b: str) -> str:
        return self._op("Mul", a, b)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Any operator of the ONNX standard."""
        return self._op(kind, *inputs, **attributes)

    def linear(self, x: str, *modules: str, bias: bool = False) -> str:
        """Linear layers of one input as one product, outputs concatenated. ``bias`` needs a single module."""
        y = self._product(x, *modules)
        if bias:
            (module,) = modules
            y = self.add(y, self.weight(f"{module}.bias"))
        return y

    def linears(self, x: str, *modules: str) -> list[str]:
        """Linear layers of one input, with separate outputs."""
        return [self.linear(x, module) for module in modules]

    def attend(self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int, mask: str | None = None) -> str:
        """q (B, T, heads * head_dim), keys and values (B, kv_heads, P, head_dim) -> (B, T, heads * head_dim).

        Made of basic operators: ONNX Runtime's fused ones do not take an empty past and a mask together.
        """
        # (B, kv_heads, queries per kv head, T, head_dim): no key is repeated
        q = self.reshape(q, 0, 0, kv_heads, heads // kv_heads, head_dim)
        q = self.multiply(self.transpose(q, 0, 2, 3, 1, 4), self.scalar(head_dim**-0.5))
        k, v = (self._op("Unsqueeze", x, self.integers(2)) for x in (k, v))
        scores = self.matmul(q, self.transpose(k, 0, 1, 2, 4, 3))
        if mask is not None:
            scores = self.add(scores, mask)
        mixed = self.matmul(self._op("Softmax", scores, axis=-1), v)
        return self.reshape(self.transpose(mixed, 0, 3, 1, 2, 4), 0, 0, heads * head_dim)

    @abstractmethod
    def matmul(self, a: str, b: str) -> str:
        """The product of two activations."""

    @abstractmethod
    def embed(self, ids: str, module: str) -> str:
        """Look up rows of a table, in float32."""

    @abstractmethod
    def layer_norm(self, x: str, module: str, epsilon: float) -> str: ...

    @abstractmethod
    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        """``weight`` is a value of the graph, not the name of a tensor."""

    @abstractmethod
    def activation(self, x: str, kind: Activation) -> str: ...

    @abstractmethod
    def linear_activated(self, x: str, module: str, kind: Activation) -> str:
        """A linear layer with bias, then an activation."""

    @abstractmethod
    def linear_scaled(self, x: str, module: str, scale: str) -> str:
        """A linear layer with bias, its outputs multiplied by a tensor of the policy (LayerScale)."""

    @abstractmethod
    def rotary(self, x: str, heads: int, tables: tuple[str, str]) -> str:
        """Rotary embedding by the rows of ``tables``: cosines and sines (positions, head_dim / 2)."""

    @abstractmethod
    def attention(self, q: str, k: str, v: str, heads: int, kv_heads: int, head_dim: int) -> str:
        """Bidirectional softmax attention: q has heads * head_dim channels, k and v have kv_heads * head_dim.

        For attention with a mask or a past, see ``attend``.
        """

    def has_cached_attention(self, head_dim: int) -> bool:
        """Whether ``cached_attention`` exists for heads of this size."""
        return False

    def cached_attention(
        self, qkv: str, past: tuple[str, str], start: str, tables: tuple[str, str], heads: int, kv_heads: int
    ) -> tuple[str, tuple[str, str]]:
        """Causal attention of the rows from position ``start`` (1,) on to themselves and to the past.

        ``qkv``: (B, T, (heads + 2 * kv_heads) * head_dim), not rotated. ``past``: keys and values (B, kv_heads,
        capacity, head_dim); the new ones are written into these buffers. Returns (B, T, heads * head_dim) and the
        updated buffers.
        """
        raise NotImplementedError

    @abstractmethod
    def convolution(
        self, x: str, module: str, scale: NDArray[np.float32], bias: NDArray[np.float32], **shape: Any
    ) -> str:
        """A convolution of (batch, channels, H, W); outputs are multiplied by ``scale``, then ``bias`` is added."""

    @abstractmethod
    def _product(self, x: str, *modules: str) -> str:
        """x times the transposed weights of these modules, outputs concatenated."""

    # Operators

    def _store(self, name: str, array: NDArray[Any]) -> str:
        return self._store_as(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array)

    def _store_as(self, name: str, kind: int, shape: Iterable[int], data: NDArray[Any]) -> str:
        """A constant whose type (of onnx.TensorProto) numpy may not have."""
        if name not in self._initializers:
            self._initializers[name] = Constant(name, kind, tuple(shape), flatten(data, self.allocate))
        return name

    def _op(self, kind: str, *inputs: str, domain: str = "", out: str | None = None, **attributes: Any) -> str:
        value = out or self._name()
        self._nodes.append(helper.make_node(kind, inputs, [value], domain=domain, **attributes))
        return value

    def _name(self) -> str:
        self._values += 1
        return f"v{self._values}"


def join_names(names: list[str]) -> str:
    """One name for several tensors of a module: a.q.weight, a.k.weight -> a.q+k.weight."""
    first, *others = (name.removesuffix(".weight") for name in names)
    return "+".join([first, *(other.rpartition(".")[2] for other in others)]) + ".weight"


def quantize_columns(
    matrix: NDArray[np.float32], largest: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights (in, out) to int8, with a scale for every output (out,).

    ``largest`` (out,): the magnitude that becomes 127 (default: each output's largest weight).
    """
    largest = np.abs(matrix).max(0) if largest is None else largest
    scale = np.maximum(largest / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale
