"""The memory of a graph's tensors, and the profile that fits their shapes. Needs no device.

A tensor that one pass writes and a later one reads stays on the device and is not copied. An autoregressive decoder
reads its past from one memory and writes the present, which is longer, into another; the next pass swaps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import GraphSpec
from rlrc.artifact.build_plan import GraphPlan, fits
from rlrc.runtime.inference.decode import NoAction

PAST, PRESENT = "past.", "present."
BY_HOST = ("image_tokens",)
"""Outputs that go through the host, because the policy concatenates those of all cameras for the next graph."""
SPARE = 8  # a growing memory gets an eighth more than needed, so that it does not grow with every token
ALIGNMENT = 256  # also the smallest size: TensorRT needs an address for empty tensors too

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class DeviceMemory(Protocol):
    """Bytes on the device; ``host``: the same bytes if the host can access them. Freed with the object."""

    @property
    def address(self) -> int: ...

    @property
    def host(self) -> NDArray[np.uint8]: ...


Allocate = Callable[[int], DeviceMemory]


class Buffer:
    """Memory that grows and then loses its contents."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate, self._nbytes = allocate, 0
        self._memory: DeviceMemory | None = None

    def room(self, nbytes: int) -> DeviceMemory:
        """Memory of at least ``nbytes``."""
        if self._memory is None or nbytes > self._nbytes:
            self._memory = None  # freed before more is taken
            self._nbytes = 0
            wanted = max(ALIGNMENT, -(-(nbytes + nbytes // SPARE) // ALIGNMENT) * ALIGNMENT)
            self._memory, self._nbytes = self._allocate(wanted), wanted
        return self._memory


class RetainedTensor:
    """A tensor that stays on the device between the pass that writes it and those that read it."""

    def __init__(self, allocate: Allocate, sides: Literal[1, 2]) -> None:
        """``sides``: 2 if the same pass reads and writes it."""
        self._buffers = [Buffer(allocate) for _ in range(sides)]
        self._reading = 0

    def begin(self) -> None:
        """Starts a new sequence, always with the same side, so that first passes always have the same addresses."""
        self._reading = 0

    def read(self) -> int:
        """The address of the last value."""
        return self._buffers[self._reading].room(0).address

    def write(self, nbytes: int) -> int:
        """The address for the next value."""
        return self._buffers[self._next()].room(nbytes).address

    def swap(self) -> None:
        """Makes the written value the one to read."""
        self._reading = self._next()

    def _next(self) -> int:
        return (self._reading + 1) % len(self._buffers)


class Repeats:
    """Decides when to capture a pass: the third time that shapes and addresses are the same.

    The first pass with new shapes must run uncaptured, because TensorRT then prepares for them.
    """

    def __init__(self) -> None:
        self._last: Any = None
        self._times = 0

    def next(self, signature: Any) -> Literal["run", "capture", "replay"]:
        if signature != self._last:
            self._last, self._times = signature, 0
        self._times += 1
        return "run" if self._times < 3 else "capture" if self._times == 3 else "replay"

    def forget(self) -> None:
        """After a failed pass."""
        self._last = None


def links(graphs: Mapping[str, GraphSpec]) -> dict[tuple[str, str], str]:
    """(graph, output) -> the name of the input of the same or another graph that reads it on the device."""
    taken = {tensor.name for graph in graphs.values() for tensor in graph.inputs}
    found = {}
    for graph in graphs.values():
        for output in graph.outputs:
            name = PAST + output.name.removeprefix(PRESENT) if output.name.startswith(PRESENT) else output.name
            if name in taken and name not in BY_HOST:
                found[graph.name, output.name] = name
    return found


def input_shapes(graph: GraphSpec, inputs: Mapping[str, NDArray[Any]], made: Mapping[str, Shape], start: int) -> Shapes:
    """The shape of every input: as given, as ``made`` on the device, or a past of ``start`` positions.

    A past has batch size 1, as the profiles have.
    """
    shapes: Shapes = {}
    for tensor in graph.inputs:
        if tensor.name.startswith(PAST):
            shapes[tensor.name] = (1, *(size if isinstance(size, int) else start for size in tensor.shape[1:]))
        elif tensor.name in made:
            shapes[tensor.name] = made[tensor.name]
        else:
            shapes[tensor.name] = inputs[tensor.name].shape
    return shapes


def profile_of(plan: GraphPlan, shapes: Shapes) -> int:
    """The index of the first profile that fits the shapes. Raises NoAction if none does."""
    for number, profile in enumerate(plan.profiles):
        if fits(profile, shapes):
            return number
    largest = {name: bounds.max for name, bounds in plan.profiles[0].items()}
    raise NoAction(f'expected inputs of "{plan.name}" within the range of its engine, up to {largest}, found {shapes}')


def nbytes(shape: Shape, dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
