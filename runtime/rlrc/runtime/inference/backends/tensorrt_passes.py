"""Runs passes on TensorRT contexts: assigns memory to tensors, updates what changed, captures and replays.

The device is accessed through ``DeviceStream`` and ``Context``, the latter a part of TensorRT's IExecutionContext. The
policy's inputs and outputs are in memory that host and device share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from rlrc.artifact import GraphSpec, TensorSpec
from rlrc.artifact.build_plan import BuildPlan
from rlrc.runtime.inference.backends.tensorrt_memory import (
    PAST,
    Buffer,
    DeviceMemory,
    Repeats,
    RetainedTensor,
    Shape,
    Shapes,
    input_shapes,
    links,
    nbytes,
    profile_of,
)
from rlrc.runtime.inference.decode import NoAction


class Context(Protocol):
    """An execution context for one profile of one engine."""

    def set_input_shape(self, name: str, shape: Shape) -> bool: ...

    def get_tensor_shape(self, name: str) -> Sequence[int]: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class DeviceStream(Protocol):
    """A device with one stream, whose work runs in order."""

    @property
    def stream(self) -> int: ...

    def shared(self, nbytes: int) -> DeviceMemory:
        """Memory that the host can access too."""
        ...

    def own(self, nbytes: int) -> DeviceMemory:
        """Memory that only the device can access."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Captures, without running it, what ``enqueue`` puts on the stream. The returned function runs it."""
        ...

    def finish(self) -> None:
        """Waits until the stream is empty."""
        ...


@dataclass
class _ContextState:
    """What was last set in a context."""

    shapes: Shapes = field(default_factory=dict)
    outputs: Shapes = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=Repeats)
    captured: Callable[[], None] | None = None


class Passes:
    """``contexts``: of every graph, one per profile of the plan. ``reason``: returns TensorRT's last errors."""

    def __init__(
        self,
        graphs: Mapping[str, GraphSpec],
        plan: BuildPlan,
        contexts: Mapping[str, Sequence[Context]],
        device: DeviceStream,
        reason: Callable[[], str],
    ) -> None:
        self._graphs, self._contexts, self._device, self._reason = graphs, contexts, device, reason
        self._plans = {graph.name: graph for graph in plan.graphs}
        self._state = {name: [_ContextState() for _ in each] for name, each in contexts.items()}
        self._links = links(graphs)
        self._kept = {
            name: RetainedTensor(device.own, 2 if name.startswith(PAST) else 1) for name in self._links.values()
        }
        self._made: Shapes = {}
        self._buffers: dict[tuple[str, str], Buffer] = {}
        self._length = 0

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name, except those that stay on the device. Raises NoAction if the device fails."""
        spec = self._graphs[graph]
        start, end = self._positions(spec, inputs)
        shapes = input_shapes(spec, inputs, self._made, start)
        profile = profile_of(self._plans[graph], shapes)
        context, state = self._contexts[graph][profile], self._state[graph][profile]
        self._length = 0  # until the pass has succeeded: after a failure, a new sequence must start
        try:
            self._shape(spec, context, state, shapes)
            shared = self._fill(spec, inputs, shapes, state.outputs)
            self._address(spec, context, state, shared)
            self._enqueue(context, state)
            self._device.finish()
        except BaseException:
            state.shapes, state.captured = {}, None
            state.repeats.forget()
            raise
        self._keep(spec, state.outputs)
        self._length = end
        return {
            tensor.name: _view(shared[tensor.name], state.outputs[tensor.name], tensor.dtype).copy()
            for tensor in spec.outputs
            if (graph, tensor.name) not in self._links
        }

    def _positions(self, spec: GraphSpec, inputs: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
        """Start and end of the pass. Raises NoAction if it neither continues the last pass nor starts a sequence."""
        if not any(tensor.name.startswith(PAST) for tensor in spec.inputs):
            return 0, self._length
        start, end = int(inputs["start"][0]), int(inputs["end"][0])
        if start not in (0, self._length):
            raise NoAction(f"expected a pass from position 0 or {self._length}, found one from {start}")
        if start == 0:
            for name, kept in self._kept.items():
                if name.startswith(PAST):
                    kept.begin()
        return start, end

    def _shape(self, spec: GraphSpec, context: Context, state: _ContextState, shapes: Shapes) -> None:
        """Sets the shapes of the inputs and reads the resulting shapes of the outputs."""
        if shapes == state.shapes:
            return
        for name, shape in shapes.items():
            if shape != state.shapes.get(name):
                self._require(context.set_input_shape(name, shape), f"{spec.name} to take {name} of {shape}")
        state.outputs = {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in spec.outputs}
        if any(size < 0 for shape in state.outputs.values() for size in shape):
            raise NoAction(f"expected {spec.name}'s outputs to have shapes, found {state.outputs}: {self._reason()}")
        state.shapes = shapes

    def _fill(
        self, spec: GraphSpec, inputs: Mapping[str, NDArray[Any]], shapes: Shapes, outputs: Shapes
    ) -> dict[str, DeviceMemory]:
        """The shared memory of inputs and outputs, with the inputs copied in."""
        shared = {}
        for tensor in spec.inputs:
            if tensor.name not in self._kept:
                memory = shared[tensor.name] = self._buffer(spec, tensor, shapes[tensor.name])
                _view(memory, shapes[tensor.name], tensor.dtype)[...] = inputs[tensor.name]
        for tensor in spec.outputs:
            if (spec.name, tensor.name) not in self._links:
                shared[tensor.name] = self._buffer(spec, tensor, outputs[tensor.name])
        return shared

    def _buffer(self, spec: GraphSpec, tensor: TensorSpec, shape: Shape) -> DeviceMemory:
        buffer = self._buffers.setdefault((spec.name, tensor.name), Buffer(self._device.shared))
        return buffer.room(nbytes(shape, tensor.dtype))

    def _address(
        self, spec: GraphSpec, context: Context, state: _ContextState, shared: Mapping[str, DeviceMemory]
    ) -> None:
        addresses = {name: memory.address for name, memory in shared.items()}
        for tensor in spec.inputs:
            if tensor.name in self._kept:
                addresses[tensor.name] = self._kept[tensor.name].read()
        for tensor in spec.outputs:
            if (spec.name, tensor.name) in self._links:
                kept = self._kept[self._links[spec.name, tensor.name]]
                addresses[tensor.name] = kept.write(nbytes(state.outputs[tensor.name], tensor.dtype))
        for name, address in addresses.items():
            if address != state.addresses.get(name):
                self._require(context.set_tensor_address(name, address), f"{spec.name} to take an address for {name}")
        state.addresses = addresses

    def _enqueue(self, context: Context, state: _ContextState) -> None:
        def execute() -> None:
            self._require(context.execute_async_v3(self._device.stream), "the pass to run")

        step = state.repeats.next((state.shapes, state.addresses))
        if step == "run":
            state.captured = None
        if step == "capture":
            with suppress(NoAction):  # an engine that synchronises within a pass cannot be captured
                state.captured = self._device.capture(execute)
        (state.captured or execute)()

    def _keep(self, spec: GraphSpec, outputs: Shapes) -> None:
        for (graph, output), name in self._links.items():
            if graph == spec.name:
                self._kept[name].swap()
                self._made[name] = outputs[output]

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise NoAction(f"expected {what}, found that TensorRT refused: {self._reason()}")


def _view(memory: DeviceMemory, shape: Shape, dtype: str) -> NDArray[Any]:
    return memory.host[: nbytes(shape, dtype)].view(dtype).reshape(shape)
