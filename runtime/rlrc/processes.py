"""A pool of worker processes that cannot hang: if one dies, or none reports in time, the run ends with one clear line.

The standard library's pools wait forever for a worker that the system killed (multiprocessing.Pool) or have no time
limit (concurrent.futures). Simulators and their renderers do crash.
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

QUESTION = "question"
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000", or "max 100000"

Job = TypeVar("Job")
Result = TypeVar("Result")


_to_parent: Connection | None = None  # of a worker process


def cores() -> int:
    """How many cores this process may use, by its CPU affinity and its control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CPU_MAX.read_text().split()
        allowed = min(allowed, round(int(quota) / int(period)))
    return max(1, allowed)


class WorkerPool:
    """Up to ``number`` processes that run jobs. As a context manager it ends them on exit.

    They start with the first jobs and are kept from one ``run`` to the next.
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
        self,
        function: Callable[[Job], Result],
        jobs: Sequence[Job],
        silence_s: float = 300.0,
        answer: Callable[[list[Any]], Sequence[Any]] | None = None,
    ) -> Iterator[tuple[Job, Result]]:
        """Yields (job, function(job)) as jobs finish. ``function`` and the jobs must be picklable.

        ``answer``: the answers to what jobs ``ask``, in the order of the questions. It is called once all running jobs
        have asked, so that which questions it gets together does not depend on time.

        Raises UserError if a worker raises one or dies, or if none reports within ``silence_s`` seconds; RuntimeError
        with the worker's traceback for any other error.
        """
        waiting = list(reversed(jobs))
        running: dict[Connection, Job] = {}
        asked: dict[Connection, Any] = {}
        try:
            while len(self.processes) < min(self.number, len(jobs)):
                self._start()
            for connection in list(self.processes)[: len(jobs)]:
                running[connection] = _send(connection, function, waiting.pop())
            while running:
                ready = wait([connection for connection in running if connection not in asked], silence_s)
                if not ready:
                    raise UserError(
                        f"expected a worker process to report within {silence_s:g} s, found none that did; the "
                        "simulator hangs or the machine is overloaded: pass fewer --workers and run the command again"
                    )
                for connection in [one for one in running if one in ready]:
                    kind, result = self._receive(connection)
                    if kind == QUESTION:
                        asked[connection] = result
                        continue
                    job = running.pop(connection)
                    if waiting:
                        running[connection] = _send(connection, function, waiting.pop())
                    yield job, result
                if asked and len(asked) == len(running):
                    assert answer is not None
                    order = [connection for connection in running if connection in asked]
                    for connection, given in zip(order, answer([asked[one] for one in order]), strict=True):
                        with suppress(ConnectionError):  # it died in between: the next wait reports it
                            connection.send(given)
                    asked.clear()
        except BaseException:  # or the caller stopped early: running jobs must not reply to the next call
            self.kill()
            raise

    def kill(self) -> None:
        """Kills all processes."""
        for process in self.processes.values():
            process.kill()
        for connection, process in self.processes.items():
            process.join()
            connection.close()
        self.processes.clear()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks held by engine and renderer threads
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that our end reports EOF when the worker dies
        self.processes[ours] = process

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        """The result of a job or what it asks."""
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionError):
            process = self.processes[connection]
            process.join(5)
            raise UserError(
                f"expected every worker process to finish, found that one ended by {describe_exit(process.exitcode)}; "
                "it may have run out of memory: free some, or pass fewer --workers, and run the command again"
            ) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"a worker failed:\n{value}")
        return kind, value


def _send(connection: Connection, function: Callable[[Job], Any], job: Job) -> Job:
    with suppress(ConnectionError):  # it died in between: the next wait reports it
        connection.send((function, job))
    return job


def describe_exit(code: int | None) -> str:
    """The signal or exit code of a process that has ended."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def ask(question: Any) -> Any:
    """In a job of a WorkerPool: the answer of the process that runs the pool (see WorkerPool.run)."""
    assert _to_parent is not None
    _to_parent.send((QUESTION, question))
    return _to_parent.recv()


def _work(connection: Connection) -> None:
    global _to_parent
    _to_parent = connection
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent kills the workers
    while True:
        try:
            received = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, job = pickle.loads(received)  # imports the function's module, which may fail
            connection.send(("done", function(job)))
        except UserError as error:
            connection.send(("user error", str(error)))
        except Exception:
            connection.send(("error", traceback.format_exc()))


def die_with_parent() -> None:
    """Has Linux kill this process when the one that started it dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
