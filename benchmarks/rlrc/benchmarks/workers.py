"""A pool of processes that never hangs: a worker that dies or falls silent ends the run with an error.

The pools of the standard library wait for ever for a worker that the system killed (multiprocessing.Pool) or cannot be
given a limit of silence (concurrent.futures); simulators and their renderers do crash.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from rlrc.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_workers(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, silence_s: float = 300.0
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, function(job)) as they finish. ``function`` and jobs must be picklable.

    Raises UserError as the worker raised it, and RuntimeError if a worker fails otherwise, dies, or if none reports
    within ``silence_s`` seconds. Whatever happens, no worker outlives the iterator.
    """
    if workers < 1:
        raise UserError(f"expected at least one worker, found {workers}; pass --workers 1 or more")
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of engines and renderers
    pending = list(reversed(jobs))
    running: dict[Any, tuple[SpawnProcess, Job]] = {}
    processes: list[SpawnProcess] = []
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function), daemon=True)
            processes.append(process)
            process.start()
            theirs.close()  # so that ours reports the end of the file when the worker dies
            running[ours] = (process, pending.pop())
            ours.send(running[ours][1])
        while running:
            ready = wait(list(running), silence_s)
            if not ready:
                raise RuntimeError(f"no worker reported within {silence_s:g} s; the simulator may hang")
            for reporting in (connection for connection in running.copy() if connection in ready):
                process, job = running.pop(reporting)
                yield job, _receive(reporting, process)
                if pending:
                    running[reporting] = (process, pending.pop())
                    with suppress(BrokenPipeError):  # died in between: the next wait tells
                        reporting.send(running[reporting][1])
                else:
                    reporting.close()
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _receive(connection: Connection, process: SpawnProcess) -> Any:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join(5)
        raise RuntimeError(f"a worker died (exit code {process.exitcode}); it may have run out of memory") from None
    if kind == "user error":
        raise UserError(value)
    if kind == "error":
        raise RuntimeError(f"a worker failed:\n{value}")
    return value


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            reply = ("done", function(job))
        except UserError as error:
            reply = ("user error", str(error))
        except Exception:
            reply = ("error", traceback.format_exc())
        connection.send(reply)
