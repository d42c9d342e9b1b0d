"""Which memory a graph's tensors lie in, and which of its profiles fits them. Needs no device.

A tensor that one pass makes and a later one reads stays where it was made: it is never copied, nor seen by the host. An
autoregressive decoder reads its past from one memory and writes the present, which is longer, into another; for the
next pass they change places.
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
"""Outputs that another graph takes but the policy first puts together: those of all cameras."""
SPARE = 8  # a memory that grows gets an eighth more than is needed: the next token needs no other
ALIGNMENT = 256  # of what is asked for; no memory is empty, because TensorRT wants an address for an empty tensor too

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class DeviceMemory(Protocol):
    """Bytes on the device; ``host`` are the same bytes where the host sees them too. Freed with the object."""

    @property
    def address(self) -> int: ...

    @property
    def host(self) -> NDArray[np.uint8]: ...


Allocate = Callable[[int], DeviceMemory]


class Buffer:
    """Memory that grows. What was in it is then lost."""

    def __init__(self, allocate: Allocate) -> None:
        self._allocate, self._nbytes = allocate, 0
        self._memory: DeviceMemory | None = None

    def room(self, nbytes: int) -> DeviceMemory:
        """At least so many bytes."""
        if self._memory is None or nbytes > self._nbytes:
            self._memory = None  # freed before more is taken
            self._nbytes = 0
            wanted = max(ALIGNMENT, -(-(nbytes + nbytes // SPARE) // ALIGNMENT) * ALIGNMENT)
            self._memory, self._nbytes = self._allocate(wanted), wanted
        return self._memory


class RetainedTensor:
    """A tensor that stays on the device from the pass that makes it to those that read it."""

    def __init__(self, allocate: Allocate, sides: Literal[1, 2]) -> None:
        """``sides``: 2 where a pass that reads it makes it anew."""
        self._buffers = [Buffer(allocate) for _ in range(sides)]
        self._reading = 0

    def begin(self) -> None:
        """A new sequence: always with the same side, so that its first pass has the same addresses every time."""
        self._reading = 0

    def read(self) -> int:
        """The address of what was made last."""
        return self._buffers[self._reading].room(0).address

    def write(self, nbytes: int) -> int:
        """The address for what is made next."""
        return self._buffers[self._next()].room(nbytes).address

    def made(self) -> None:
        """It has been made: from now on it is what is read."""
        self._reading = self._next()

    def _next(self) -> int:
        return (self._reading + 1) % len(self._buffers)


class Repeats:
    """When a pass is worth capturing: the third time that shapes and addresses are the same.

    The first pass with other shapes has to run uncaptured, because TensorRT then prepares itself for them.
    """

    def __init__(self) -> None:
        self._seen: Any = None
        self._times = 0

    def next(self, signature: Any) -> Literal["run", "capture", "replay"]:
        if signature != self._seen:
            self._seen, self._times = signature, 0
        self._times += 1
        return "run" if self._times < 3 else "capture" if self._times == 3 else "replay"

    def forget(self) -> None:
        """The pass failed."""
        self._seen = None


def links(graphs: Mapping[str, GraphSpec]) -> dict[tuple[str, str], str]:
    """(graph, output) -> the name of the input, of the same or another graph, that takes it without the host."""
    taken = {tensor.name for graph in graphs.values() for tensor in graph.inputs}
    found = {}
    for graph in graphs.values():
        for output in graph.outputs:
            name = PAST + output.name.removeprefix(PRESENT) if output.name.startswith(PRESENT) else output.name
            if name in taken and name not in BY_HOST:
                found[graph.name, output.name] = name
    return found


def input_shapes(graph: GraphSpec, inputs: Mapping[str, NDArray[Any]], made: Mapping[str, Shape], start: int) -> Shapes:
    """Of every input: of what is given, of what was ``made`` on the device, of a past of ``start`` positions.

    The past is of one observation, as the profiles are.
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
    """The first profile that the shapes fit. Raises NoAction if none does."""
    for number, profile in enumerate(plan.profiles):
        if fits(profile, shapes):
            return number
    largest = {name: bounds.max for name, bounds in plan.profiles[0].items()}
    raise NoAction(
        f'expected inputs of "{plan.name}" within what its engine was built for, up to {largest}, found {shapes}'
    )


def nbytes(shape: Shape, dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
