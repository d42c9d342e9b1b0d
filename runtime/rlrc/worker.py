"""A process beside the control loop: asked one thing at a time, arrays in shared memory, never waited for.

The loop must go on whatever the other does: hang, crash, be killed. So it only ever looks whether an answer has come. A
process rather than a thread, because a thread that hangs cannot be ended, one that crashes takes the loop along, and
Python's lock would let preprocessing delay commands.
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
Listed = list[tuple[str, str, list[int], int]]  # name, dtype, shape, offset
ALIGNMENT = 64


class WorkerDied(RuntimeError):
    """The process is no more. The message says how it ended."""


class Channel:
    """The child's side. ``serve`` functions take one first, then their own arguments."""

    def __init__(self, connection: Connection, question: Any, answer: Any) -> None:
        self._connection = connection
        self._question, self._answer = (np.frombuffer(memory, np.uint8) for memory in (question, answer))

    def receive(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The next question; its arrays stay until it is answered. Raises EOFError once the loop is gone."""
        message = msgpack.unpackb(self._connection.recv_bytes())
        return message["values"], _views(self._question, message["arrays"])

    def reply(self, values: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        self._connection.send_bytes(_message(values, _stored(self._answer, arrays or {})))


class WorkerProcess:
    """``serve(channel, *arguments)`` in a process of its own; both have to be picklable. ``what`` names it in errors.

    ``question`` and ``answer`` are the bytes that the arrays of one may take, alignment aside.
    """

    def __init__(
        self, serve: Callable[..., None], arguments: tuple[Any, ...], what: str, question: int, answer: int
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of engines and renderers
        memories = [context.RawArray(ctypes.c_uint8, size + 64 * ALIGNMENT) for size in (question, answer)]
        self._question, self._answer = (np.frombuffer(memory, np.uint8) for memory in memories)  # type: ignore[call-overload]
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(serve, theirs, *memories, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that ours reports the end of the file when it dies
        self._poller = select.poll()  # Connection.poll makes one anew every time, for ten times as long
        self._poller.register(self._connection, select.POLLIN)
        self.what, self.busy = what, False

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def fileno(self) -> int:
        """Ready to be read when an answer has come, or the process has ended."""
        return self._connection.fileno()

    @property
    def sentinel(self) -> int:
        """A descriptor that is ready to be read once the process has ended."""
        return self._process.sentinel

    def ask(self, values: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """Raises Dead; RuntimeError while an answer is outstanding."""
        if self.busy:
            raise RuntimeError(f"{self.what} was asked before it answered")
        try:
            self._connection.send_bytes(_message(values, _stored(self._question, arrays or {})))
        except OSError:
            raise self._death() from None
        self.busy = True

    def poll(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        """The answer, if it has come. Raises Dead."""
        try:
            if not self._poller.poll(0):
                if self._process.exitcode is not None:
                    raise self._death()
                return None
            message = msgpack.unpackb(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._death() from None
        self.busy = False
        views = _views(self._answer, message["arrays"])
        return message["values"], {name: view.copy() for name, view in views.items()}

    def wait(self, seconds: float) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The answer, outside of the loop. Raises UserError if it does not come in time or tells of an error."""
        deadline = time.monotonic() + seconds
        while (answer := self._polled()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise UserError(
                    f"expected {self.what} to answer within {seconds:g} s, found that it did not; the machine is "
                    "overloaded, or it hangs: run the command again"
                )
            self._connection.poll(0.05)
        if "error" in answer[0]:
            raise UserError(answer[0]["error"])
        return answer

    def _polled(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        try:
            return self.poll()
        except WorkerDied:
            self._process.join(1)
            error = self._death()
            raise UserError(f"expected {self.what} to go on, found: {error}; what it printed above says why") from None

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()
        self._process.join()
        with suppress(OSError):
            self._connection.close()

    def _death(self) -> WorkerDied:
        code = self._process.exitcode
        return WorkerDied(f"{self.what} ended{f' by {describe_exit(code)}' if code is not None else ''}")


def _main(serve: Callable[..., None], connection: Connection, question: Any, answer: Any, arguments: Any) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the loop has to brake first
    lock_used_memory()
    channel = Channel(connection, question, answer)
    try:
        serve(channel, *arguments)
    except UserError as error:
        channel.reply({"error": str(error)})
    except (EOFError, ConnectionError):
        return


def _message(values: Mapping[str, Any], listed: Listed) -> bytes:
    packed: bytes = msgpack.packb({"values": dict(values), "arrays": listed})
    return packed


def _stored(memory: NDArray[np.uint8], arrays: Arrays) -> Listed:
    """Copies arrays into the memory, one behind the other."""
    listed: Listed = []
    start = 0
    for name, array in arrays.items():
        if start + array.nbytes > len(memory):
            raise UserError(
                f"expected arrays of up to {len(memory)} bytes, found {name} with {array.nbytes} behind {start}; "
                "send pictures of the size of the first ones"
            )
        _view(memory, array.dtype, array.shape, start)[...] = array
        listed.append((name, array.dtype.str, list(array.shape), start))
        start += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return listed


def _views(memory: NDArray[np.uint8], listed: Listed) -> dict[str, NDArray[Any]]:
    return {name: _view(memory, np.dtype(dtype), tuple(shape), start) for name, dtype, shape, start in listed}


def _view(memory: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> NDArray[Any]:
    size = dtype.itemsize * int(np.prod(shape))
    return memory[start : start + size].view(dtype).reshape(shape)
