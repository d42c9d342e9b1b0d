"""A worker process for the control loop: one request at a time, arrays in shared memory, replies polled.

The loop must continue if the worker hangs, crashes or is killed, so it only checks whether a reply has arrived. A
process rather than a thread: a thread that hangs cannot be killed, one that crashes ends the loop too, and Python's
global lock would let preprocessing delay commands.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import select
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.processes import describe_exit, die_with_parent
from rlrc.realtime import lock_used_memory

Arrays = Mapping[str, NDArray[Any]]
Layout = list[tuple[str, str, list[int], int]]  # name, dtype, shape, offset
ALIGNMENT = 64


class WorkerDied(RuntimeError):
    """The worker process has ended. The message says how."""


class Channel:
    """The worker's end of the connection: the first argument of ``serve`` functions, before their own arguments."""

    def __init__(self, connection: Connection, request: Any, reply: Any) -> None:
        self._connection = connection
        self._request, self._reply = (np.frombuffer(memory, np.uint8) for memory in (request, reply))

    def receive(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The next request; its arrays are valid until the reply. Raises EOFError once the other process has ended."""
        message = msgpack.unpackb(self._connection.recv_bytes())
        return message["values"], _views(self._request, message["arrays"])

    def reply(self, values: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        self._connection.send_bytes(_message(values, _store(self._reply, arrays or {})))


class WorkerProcess:
    """Runs ``serve(channel, *arguments)``, both picklable, in a new process. ``what`` names it in errors.

    ``request`` and ``reply`` are the most bytes that the arrays of one message take, without alignment.
    """

    def __init__(
        self, serve: Callable[..., None], arguments: tuple[Any, ...], what: str, request: int, reply: int
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks held by engine and renderer threads
        memories = [context.RawArray(ctypes.c_uint8, size + 64 * ALIGNMENT) for size in (request, reply)]
        self._request, self._reply = (np.frombuffer(memory, np.uint8) for memory in memories)  # type: ignore[call-overload]
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(serve, theirs, *memories, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that our end reports EOF when the worker dies
        self._poller = select.poll()  # Connection.poll creates one per call and takes ten times as long
        self._poller.register(self._connection, select.POLLIN)
        self.what, self.busy = what, False

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def fileno(self) -> int:
        """A descriptor that is readable when a reply has arrived or the process has ended."""
        return self._connection.fileno()

    @property
    def sentinel(self) -> int:
        """A descriptor that is readable once the process has ended."""
        return self._process.sentinel

    def ask(self, values: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """Sends a request. Raises WorkerDied, and RuntimeError while a reply is outstanding."""
        if self.busy:
            raise RuntimeError(f"{self.what} got a request before it replied to the last one")
        try:
            self._connection.send_bytes(_message(values, _store(self._request, arrays or {})))
        except OSError:
            raise self._death() from None
        self.busy = True

    def poll(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        """The reply, or None if it has not arrived. Raises WorkerDied."""
        try:
            if not self._poller.poll(0):
                if self._process.exitcode is not None:
                    raise self._death()
                return None
            message = msgpack.unpackb(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._death() from None
        self.busy = False
        views = _views(self._reply, message["arrays"])
        return message["values"], {name: view.copy() for name, view in views.items()}

    def wait(self, seconds: float) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Waits for the reply, outside the control loop. Raises UserError if it is late or reports an error."""
        deadline = time.monotonic() + seconds
        while (reply := self._poll_or_refuse()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise UserError(
                    f"expected {self.what} to reply within {seconds:g} s, found no reply; the machine is overloaded or "
                    f"{self.what} hangs: run the command again"
                )
            self._connection.poll(0.05)
        if "error" in reply[0]:
            raise UserError(reply[0]["error"])
        return reply

    def _poll_or_refuse(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        try:
            return self.poll()
        except WorkerDied:
            self._process.join(1)
            error = self._death()
            raise UserError(
                f"expected {self.what} to keep running, found: {error}; its output above says why"
            ) from None

    def kill(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.join()
        with suppress(OSError):
            self._connection.close()

    def _death(self) -> WorkerDied:
        code = self._process.exitcode
        return WorkerDied(f"{self.what} ended{f' by {describe_exit(code)}' if code is not None else ''}")


def _main(serve: Callable[..., None], connection: Connection, request: Any, reply: Any, arguments: Any) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the loop must brake first
    lock_used_memory()
    channel = Channel(connection, request, reply)
    try:
        serve(channel, *arguments)
    except UserError as error:
        channel.reply({"error": str(error)})
    except (EOFError, ConnectionError):
        return


def _message(values: Mapping[str, Any], layout: Layout) -> bytes:
    packed: bytes = msgpack.packb({"values": dict(values), "arrays": layout})
    return packed


def _store(memory: NDArray[np.uint8], arrays: Arrays) -> Layout:
    """Copies the arrays into the memory, one after the other."""
    layout: Layout = []
    start = 0
    for name, array in arrays.items():
        if start + array.nbytes > len(memory):
            raise UserError(
                f"expected arrays of up to {len(memory)} bytes, found {name} of {array.nbytes} after {start}; "
                "send pictures of the same size as the first ones"
            )
        _view(memory, array.dtype, array.shape, start)[...] = array
        layout.append((name, array.dtype.str, list(array.shape), start))
        start += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return layout


def _views(memory: NDArray[np.uint8], layout: Layout) -> dict[str, NDArray[Any]]:
    return {name: _view(memory, np.dtype(dtype), tuple(shape), start) for name, dtype, shape, start in layout}


def _view(memory: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> NDArray[Any]:
    size = dtype.itemsize * int(np.prod(shape))
    return memory[start : start + size].view(dtype).reshape(shape)
