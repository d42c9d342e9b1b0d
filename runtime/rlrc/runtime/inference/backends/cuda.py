"""CUDA memory, one stream, and CUDA graphs, by cuda-python (cuda.bindings.runtime, CUDA 12 and 13).

Written from the documentation; not yet run on a device.
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
class CudaMemory:
    """A tensorrt_memory.DeviceMemory. ``host`` is empty for memory that the host cannot access."""

    address: int
    host: NDArray[np.uint8]


class Cuda:
    """The first device. Raises UserError without cuda-python, NoAction if a call fails."""

    def __init__(self) -> None:
        self._runtime = _runtime()
        self._stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def shared(self, nbytes: int) -> CudaMemory:
        """Page-locked, mapped memory: on a Jetson the same RAM, on a card accessed through its bus."""
        pointer = self._call("cudaHostAlloc", nbytes, self._runtime.cudaHostAllocMapped)
        memory = CudaMemory(self._call("cudaHostGetDevicePointer", pointer, 0), _host_view(pointer, nbytes))
        weakref.finalize(memory, self._call, "cudaFreeHost", pointer)
        return memory

    def own(self, nbytes: int) -> CudaMemory:
        memory = CudaMemory(self._call("cudaMalloc", nbytes), np.empty(0, np.uint8))
        weakref.finalize(memory, self._call, "cudaFree", memory.address)
        return memory

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        finally:  # a stream left capturing accepts no other work
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
        """Calls a function, which returns its error and then its results. Raises NoAction."""
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


def _host_view(pointer: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))
