"""CUDA's memory, one stream, and what is captured of it, by cuda-python (cuda.bindings.runtime, CUDA 12 and 13).

Written by its documentation; nothing of it has run on a device.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.inference.decode import NoAction


@dataclass(frozen=True, eq=False)
class Bytes:
    """See tensorrt_memory.Memory. ``host`` is empty where the host does not see them."""

    address: int
    host: NDArray[np.uint8]


class Cuda:
    """The first device. Raises UserError without cuda-python, NoAction where a call fails."""

    def __init__(self) -> None:
        self._runtime = _runtime()
        self._stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def shared(self, nbytes: int) -> Bytes:
        """Page-locked and mapped: on a Jetson the same chips for both, on a card read and written through its bus."""
        pointer = self._call("cudaHostAlloc", nbytes, self._runtime.cudaHostAllocMapped)
        memory = Bytes(self._call("cudaHostGetDevicePointer", pointer, 0), _seen(pointer, nbytes))
        weakref.finalize(memory, self._call, "cudaFreeHost", pointer)
        return memory

    def own(self, nbytes: int) -> Bytes:
        memory = Bytes(self._call("cudaMalloc", nbytes), np.empty(0, np.uint8))
        weakref.finalize(memory, self._call, "cudaFree", memory.address)
        return memory

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        finally:  # a stream that is left capturing takes nothing else
            graph = self._call("cudaStreamEndCapture", self._stream)
        captured = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)

        def launch() -> None:
            self._call("cudaGraphLaunch", captured, self._stream)

        weakref.finalize(launch, self._call, "cudaGraphExecDestroy", captured)
        return launch

    def finish(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Every function gives its error first, then what it has to give. Raises NoAction."""
        error, *results = getattr(self._runtime, function)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(error)
            raise NoAction(f"{function} failed: {text.decode()}")
        return results[0] if results else None


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UserError(f"expected cuda-python, found: {error}; run pip install 'rlrc[tensorrt]'") from None
    return runtime


def _seen(pointer: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
