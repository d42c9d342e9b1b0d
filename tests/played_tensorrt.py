"""TensorRT's device played by this machine: its memory, its stream, and contexts that ONNX Runtime computes.

Strict where TensorRT is, or where it would silently be wrong: shapes outside of the profile, addresses that are not of
live memory or too small, answers read before the stream has been waited for, a capture of shapes that have not run.
Fresh memory is full of NaN.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from rlrc.artifact import Artifact, GraphSpec
from rlrc.artifact.build_plan import PLAN, Bounds, read_plan
from rlrc.exporters.tensorrt.cpu_reference import open_session
from rlrc.runtime.inference.backends.tensorrt_memory import fits, nbytes
from rlrc.runtime.inference.backends.tensorrt_passes import Passes


class Bytes:
    def __init__(self, nbytes: int, seen: bool) -> None:
        self.all = np.full(nbytes, 0xFF, np.uint8)
        self.address = self.all.ctypes.data
        self.host = self.all if seen else self.all[:0]


class Machine:
    """``captures`` and ``launches`` count what the backend asked for."""

    stream = 7

    def __init__(self) -> None:
        self.live: weakref.WeakValueDictionary[int, Bytes] = weakref.WeakValueDictionary()
        self.waiting: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.captures = self.launches = 0

    def shared(self, nbytes: int) -> Bytes:
        return self._memory(nbytes, seen=True)

    def own(self, nbytes: int) -> Bytes:
        return self._memory(nbytes, seen=False)

    def _memory(self, nbytes: int, seen: bool) -> Bytes:
        memory = Bytes(nbytes, seen)
        self.live[memory.address] = memory
        return memory

    def put(self, work: Callable[[], None]) -> None:
        (self.waiting if self.recording is None else self.recording).append(work)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.recording = []
        try:
            enqueue()
        finally:
            recorded, self.recording = self.recording, None
        self.captures += 1

        def launch() -> None:
            self.launches += 1
            self.waiting.extend(recorded)

        return launch

    def finish(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def view(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        memory = self.live[address]  # KeyError: it has been freed, or never was
        assert len(memory.all) >= max(1, nbytes(shape, dtype))
        seen = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes(shape, dtype)).from_address(address))
        return seen.view(dtype).reshape(shape)


class PlayedContext:
    def __init__(self, machine: Machine, graph: GraphSpec, computed: Any, profile: dict[str, Bounds]) -> None:
        self.machine, self.graph, self.session, self.profile = machine, graph, computed, profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not fits({name: self.profile[name]}, {name: shape}):
            return False
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self.shapes.keys() != self.profile.keys():
            return (-1,)
        zeros = {tensor.name: np.zeros(self.shapes[tensor.name], tensor.dtype) for tensor in self.graph.inputs}
        return self.session.run([name], zeros)[0].shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0 and memory % 16 == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        names = {tensor.name for tensor in (*self.graph.inputs, *self.graph.outputs)}
        if stream_handle != self.machine.stream or self.addresses.keys() != names:
            return False
        if self.machine.recording is not None and self.ran != self.shapes:
            return False
        self.ran, shapes, addresses = dict(self.shapes), dict(self.shapes), dict(self.addresses)

        def work() -> None:
            given = {
                tensor.name: self.machine.view(addresses[tensor.name], shapes[tensor.name], tensor.dtype)
                for tensor in self.graph.inputs
            }
            names = [tensor.name for tensor in self.graph.outputs]
            for tensor, value in zip(self.graph.outputs, self.session.run(names, given), strict=True):
                self.machine.view(addresses[tensor.name], value.shape, tensor.dtype)[...] = value

        self.machine.put(work)
        return True


class Played(Passes):
    """The passes of an artifact's TensorRT graphs on this machine."""

    def __init__(self, artifact: Artifact, machine: Machine) -> None:
        plan = read_plan(artifact.file(PLAN))
        graphs = {graph.name: graph for graph in artifact.manifest.graphs if graph.backend == "tensorrt"}
        sessions = {name: open_session(artifact.file(graph.file), 1) for name, graph in graphs.items()}
        contexts = {
            each.name: [
                PlayedContext(machine, graphs[each.name], sessions[each.name], profile) for profile in each.profiles
            ]
            for each in plan.graphs
        }
        super().__init__(graphs, plan, contexts, machine, lambda: "no reason given")

    def versions(self) -> dict[str, str]:
        return {}
