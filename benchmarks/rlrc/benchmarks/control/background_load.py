"""Processes that run in parallel with the measured control loop: a load, and a bare timer to compare it with."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.realtime import real_time


@contextmanager
def background_load() -> Iterator[None]:
    """Another process that keeps the last processor busy."""
    process = multiprocessing.get_context("spawn").Process(target=_burn, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _burn() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    while True:
        sum(range(100_000))


@contextmanager
def timer(hz: float) -> Iterator[Callable[[], NDArray[np.float64]]]:
    """A process that does nothing but wake up at this rate, at the loop's own priority: what the machine can do."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_wake, args=(theirs, hz), daemon=True)
    process.start()
    theirs.close()
    ours.recv_bytes()  # it runs
    woken: list[NDArray[np.float64]] = []
    try:
        yield lambda: woken[0]
    finally:
        ours.send(None)
        woken.append(np.frombuffer(ours.recv_bytes(), np.float64))
        process.join()


@contextmanager
def viewer(link: str, cameras: int) -> Iterator[None]:
    """A process that looks at the operator's page as a browser does: all news, every picture ten times a second."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_view, args=(theirs, *link.split("/#"), cameras), daemon=True)
    process.start()
    theirs.close()
    ours.recv_bytes()  # it has asked for every picture once
    try:
        yield
    finally:
        process.kill()
        process.join()


def _view(connection: Any, url: str, token: str, cameras: int) -> None:
    headers = {"Authorization": f"Bearer {token}"}

    def open_url(path: str) -> Any:
        return urllib.request.urlopen(urllib.request.Request(url + path, headers=headers), timeout=60)

    def read() -> None:
        with open_url("/events") as events:
            for _ in events:
                pass

    threading.Thread(target=read, daemon=True).start()
    while True:
        for camera in range(cameras):
            with open_url(f"/camera/{camera}") as picture:
                picture.read()
        if connection is not None:
            connection.send_bytes(b"")
            connection = None
        time.sleep(0.1)


def _wake(connection: Any, hz: float) -> None:
    times, step = np.zeros(10_000_000 if hz > 100 else 1_000_000), 0
    with real_time():
        connection.send_bytes(b"")
        start = time.monotonic()
        while not connection.poll() and step < len(times):
            time.sleep(max(0.0, start + step / hz - time.monotonic()))
            times[step] = time.monotonic()
            step += 1
    connection.send_bytes(times[:step].tobytes())
