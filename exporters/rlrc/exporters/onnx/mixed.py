"""A decoder that reads its prompt in 8 bits and makes its tokens in 4, in one graph: each where it is the faster.

A prompt of hundreds of rows is bound by products, which 8-bit integers do fastest; a single row by reading the weights,
which are fewest in 4 bits. Both kinds of weights are in the file and in memory; everything else is shared.
"""

from __future__ import annotations

from typing import ClassVar

from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from rlrc.exporters.graphs.builder import TYPES
from rlrc.exporters.onnx.builder import OnnxRuntimeBuilder

MIXED = "int8+int4"
PARTS = ("int8-rows", "int4a8")


class MixedBuilder(OnnxRuntimeBuilder):
    """Of two graphs of the same interface: ``many`` for several ids, ``one`` for a single one."""

    PREFIXES: ClassVar = ("many.", "one.")

    def __init__(self, many: OnnxRuntimeBuilder, one: OnnxRuntimeBuilder) -> None:
        super().__init__(many.weights, many.flavour)
        self.inputs, self.outputs, self.memory = many.inputs, many.outputs, many.memory + one.memory
        several = self._op("Greater", self.size("ids", 1), self.integers(1))
        branches = [self._branch(each, prefix) for each, prefix in zip((many, one), self.PREFIXES, strict=True)]
        outputs = [tensor.name for tensor in self.outputs]
        self._nodes.append(helper.make_node("If", [several], outputs, then_branch=branches[0], else_branch=branches[1]))

    def _branch(self, builder: OnnxRuntimeBuilder, prefix: str) -> GraphProto:
        """Its nodes as a graph without inputs; what is constant is moved out, and shared where both have it."""
        nodes, initializers = builder._needed()
        names = {tensor.name: tensor.name for tensor in builder.inputs} | {"": ""}
        for tensor in initializers:
            names[tensor.name] = self._shared(tensor, prefix)

        def renamed(node: NodeProto) -> NodeProto:
            own = NodeProto()
            own.CopyFrom(node)
            own.input[:] = [names.get(name, prefix + name) for name in node.input]
            own.output[:] = [prefix + name for name in node.output]
            return own

        outputs: list[ValueInfoProto] = [
            helper.make_tensor_value_info(prefix + tensor.name, TYPES[tensor.dtype], None) for tensor in builder.outputs
        ]
        return helper.make_graph([renamed(node) for node in nodes], prefix.strip("."), [], outputs)

    def _shared(self, tensor: TensorProto, prefix: str) -> str:
        """Under its own name if that is free or means the same, else under another."""
        known = self._initializers.setdefault(tensor.name, tensor)
        if known.raw_data == tensor.raw_data and known.dims == tensor.dims and known.data_type == tensor.data_type:
            return tensor.name
        own = TensorProto()
        own.CopyFrom(tensor)
        own.name = prefix + tensor.name
        self._initializers[own.name] = own
        return own.name

    def _needed(self) -> tuple[list[NodeProto], list[TensorProto]]:
        """All: what the branches read is not among their node's inputs."""
        return self._nodes, list(self._initializers.values())
