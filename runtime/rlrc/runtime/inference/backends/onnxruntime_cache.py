"""The cache of keys and values between passes of a graph that decodes token by token, as ONNX Runtime tensors.

Nothing is copied between passes. A graph whose pasts are declared (batch, kv_heads, "capacity", head_dim) writes its
presents into the buffers that it reads. These have more positions than the sequence and are reused for the next one.
Any other graph returns longer keys and values at every pass, which become the past of the next pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rlrc.artifact import GraphSpec, TensorSpec
from rlrc.runtime.inference.decode import NoAction

PAST, PRESENT = "past.", "present."
CAPACITY = "capacity"
ROOM = 64  # buffers have a multiple of so many positions, and at least half of that spare


class Cache:
    """The cache of one session. ``run`` returns all outputs except keys and values."""

    def __init__(self, session: onnxruntime.InferenceSession, graph: GraphSpec) -> None:
        self._session = session
        self._pasts = [tensor for tensor in graph.inputs if tensor.name.startswith(PAST)]
        self._inputs = [tensor.name for tensor in graph.inputs if not tensor.name.startswith(PAST)]
        self._outputs = [tensor.name for tensor in graph.outputs if not tensor.name.startswith(PRESENT)]
        self._in_place = all(CAPACITY in past.shape for past in self._pasts)
        self._kept: dict[str, Any] = {}  # by the names of the pasts
        self._batch = self._length = self._capacity = 0

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Raises NoAction for a pass that neither continues the last one nor starts a new sequence."""
        start, end = int(inputs["start"][0]), int(inputs["end"][0])
        if start not in (0, self._length):
            raise NoAction(f"expected a pass from position 0 or {self._length}, found one from {start}")
        self._length = 0  # until the pass has succeeded: after a failure, a new sequence must start
        batch = len(inputs[self._inputs[0]])
        if start and batch != self._batch:
            raise NoAction(f"expected {self._batch} observations, as in the pass before, found {batch}")
        if self._in_place:
            self._make_room(start, end, batch)
        elif start == 0:
            self._kept = {past.name: _zeros(past, batch, 0) for past in self._pasts}
        binding = self._session.io_binding()
        for name in self._inputs:
            binding.bind_cpu_input(name, np.ascontiguousarray(inputs[name]))
        for name in self._outputs:
            binding.bind_output(name)
        for name, kept in self._kept.items():
            binding.bind_ortvalue_input(name, kept)
            if self._in_place:
                binding.bind_ortvalue_output(_present(name), kept)
            else:
                binding.bind_output(_present(name))
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not self._in_place:
            self._kept = dict(zip(self._kept, outputs[len(self._outputs) :], strict=True))
        self._batch, self._length = batch, end
        # Copied: in newer versions numpy() is a view of memory that the next pass overwrites.
        return {name: outputs[i].numpy().copy() for i, name in enumerate(self._outputs)}

    def _make_room(self, start: int, end: int, batch: int) -> None:
        """Ensures buffers for ``end`` positions; keeps the first ``start``."""
        if end <= self._capacity and batch == self._batch:
            return
        self._capacity = -(-(end + ROOM // 2) // ROOM) * ROOM
        grown = {past.name: _zeros(past, batch, self._capacity) for past in self._pasts}
        for name, buffer in grown.items() if start else ():
            array = buffer.numpy().copy()
            array[:, :, :start] = self._kept[name].numpy()[:, :, :start]
            grown[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self._kept = grown


def _present(past: str) -> str:
    return PRESENT + past.removeprefix(PAST)


def _zeros(past: TensorSpec, batch: int, length: int) -> Any:
    sizes = [size if isinstance(size, int) else length for size in (batch, *past.shape[1:])]
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(sizes, past.dtype))
