"""A decoder graph that reads its prompt in 8 bits and generates tokens in 4 bits, each where it is faster.

A prompt of hundreds of rows is compute-bound, and 8-bit products are fastest. A single row is bound by reading the
weights, which are smallest in 4 bits. The file and memory hold both copies of the weights; the rest is shared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from onnx import GraphProto, NodeProto, ValueInfoProto, helper

from rlrc.exporters.graphs.builder import TYPES
from rlrc.exporters.graphs.constants import Constant
from rlrc.exporters.onnx.builder import OnnxRuntimeBuilder

MIXED = "int8+int4"
PARTS = ("int8-rows", "int4a8")


class MixedBuilder(OnnxRuntimeBuilder):
    """Joins two graphs of the same inputs and outputs: ``many`` runs for several ids, ``one`` for a single id."""

    PREFIXES: ClassVar = ("many.", "one.")

    def __init__(self, many: OnnxRuntimeBuilder, one: OnnxRuntimeBuilder) -> None:
        super().__init__(many.weights, many.format, many.allocate)
        self.inputs, self.outputs, self.memory = many.inputs, many.outputs, many.memory + one.memory
        several = self._op("Greater", self.size("ids", 1), self.integers(1))
        branches = [self._branch(each, prefix) for each, prefix in zip((many, one), self.PREFIXES, strict=True)]
        outputs = [tensor.name for tensor in self.outputs]
        self._nodes.append(helper.make_node("If", [several], outputs, then_branch=branches[0], else_branch=branches[1]))

    def _branch(self, builder: OnnxRuntimeBuilder, prefix: str) -> GraphProto:
        """The builder's nodes as a subgraph; its constants move to the main graph, shared if in both branches."""
        nodes, constants = builder._drop_unused()
        names = {tensor.name: tensor.name for tensor in builder.inputs} | {"": ""}
        for constant in constants:
            names[constant.name] = self._share(constant, prefix)

        def rename(node: NodeProto) -> NodeProto:
            own = NodeProto()
            own.CopyFrom(node)
            own.input[:] = [names.get(name, prefix + name) for name in node.input]
            own.output[:] = [prefix + name for name in node.output]
            return own

        outputs: list[ValueInfoProto] = [
            helper.make_tensor_value_info(prefix + tensor.name, TYPES[tensor.dtype], None) for tensor in builder.outputs
        ]
        return helper.make_graph([rename(node) for node in nodes], prefix.strip("."), [], outputs)

    def _share(self, constant: Constant, prefix: str) -> str:
        """Add a constant, under a new name if another one already has its name."""
        if self._initializers.setdefault(constant.name, constant).has_values_of(constant):
            return constant.name
        own = replace(constant, name=prefix + constant.name)
        self._initializers[own.name] = own
        return own.name

    def _drop_unused(self) -> tuple[list[NodeProto], list[Constant]]:
        """Keep everything: values that the branches read are not inputs of the If node."""
        return self._nodes, list(self._initializers.values())
