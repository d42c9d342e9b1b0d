"""Worker processes that never hang: one that dies, or silence of all, ends the run with one clear line.

The pools of the standard library wait for ever for a worker that the system killed (multiprocessing.Pool) or cannot be
given a limit of silence (concurrent.futures); simulators and their renderers do crash.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

from rlrc.errors import UserError

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000", or "max 100000"

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Number of cores that this process may use, by its affinity and its control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CPU_MAX.read_text().split()
        allowed = min(allowed, round(int(quota) / int(period)))
    return max(1, allowed)


class WorkerPool:
    """Up to ``number`` processes that do jobs. Use as a context manager: none outlives it, nor an error, nor this
    process.

    They start when the first jobs come and are kept from one ``run`` to the next.
    """

    def __init__(self, number: int) -> None:
        if number < 1:
            raise UserError(f"expected at least one worker, found {number}; pass --workers 1 or more")
        self.number = number
        self.processes: dict[Connection, SpawnProcess] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def run(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], silence_s: float = 300.0
    ) -> Iterator[tuple[Job, Result]]:
        """Yield (job, function(job)) as they finish. ``function`` and jobs must be picklable.

        Raises UserError as a worker raised it, if a worker dies, or if none reports within ``silence_s`` seconds;
        RuntimeError with the worker's traceback if it fails otherwise.
        """
        waiting = list(reversed(jobs))
        running: dict[Connection, Job] = {}
        try:
            while len(self.processes) < min(self.number, len(jobs)):
                self._start()
            for connection in list(self.processes)[: len(jobs)]:
                running[connection] = _send(connection, function, waiting.pop())
            while running:
                ready = wait(list(running), silence_s)
                if not ready:
                    raise UserError(
                        f"expected a worker process to report within {silence_s:g} s, found none that did; the "
                        "simulator hangs or the machine is overloaded: pass fewer --workers and run the command again"
                    )
                for connection in [one for one in running if one in ready]:
                    job, result = running.pop(connection), self._receive(connection)
                    if waiting:
                        running[connection] = _send(connection, function, waiting.pop())
                    yield job, result
        except BaseException:  # an error, or nobody wants the rest: what is still running would answer the next call
            self.kill()
            raise

    def kill(self) -> None:
        """End all processes at once, whatever they do."""
        for process in self.processes.values():
            process.kill()
        for connection, process in self.processes.items():
            process.join()
            connection.close()
        self.processes.clear()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of engines and renderers
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that ours reports the end of the file when the worker dies
        self.processes[ours] = process

    def _receive(self, connection: Connection) -> Any:
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionError):
            process = self.processes[connection]
            process.join(5)
            raise UserError(
                f"expected every worker process to go on, found that one ended by {describe_exit(process.exitcode)}; "
                "it may have run out of memory: free some, or pass fewer --workers, and run the command again"
            ) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"a worker failed:\n{value}")
        return value


def _send(connection: Connection, function: Callable[[Job], Any], job: Job) -> Job:
    with suppress(ConnectionError):  # it died in between: the next wait tells
        connection.send((function, job))
    return job


def describe_exit(code: int | None) -> str:
    """The signal or exit code of a process that has ended."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _work(connection: Connection) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    while True:
        try:
            received = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, job = pickle.loads(received)  # imports the function's module, which may fail as well
            connection.send(("done", function(job)))
        except UserError as error:
            connection.send(("user error", str(error)))
        except Exception:
            connection.send(("error", traceback.format_exc()))


def die_with_parent() -> None:
    """Ask Linux to end this worker when the process that started it dies, even by SIGKILL; it would work on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
