"""Processes that run in parallel with the measured control loop: a load, a bare timer and a viewer of the page."""

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
    """Keep the last processor busy with another process."""
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
    """A process that only wakes up at this rate, at the loop's priority; the function returns its wake-up times."""
    context = multiprocessing.get_context("spawn")
    connection, remote = context.Pipe()
    process = context.Process(target=_wake, args=(remote, hz), daemon=True)
    process.start()
    remote.close()
    connection.recv_bytes()  # the process has started
    wake_times: list[NDArray[np.float64]] = []
    try:
        yield lambda: wake_times[0]
    finally:
        connection.send(None)
        wake_times.append(np.frombuffer(connection.recv_bytes(), np.float64))
        process.join()


@contextmanager
def viewer(link: str, cameras: int) -> Iterator[None]:
    """A process that reads the operator's page as a browser does: all events, and every image ten times a second."""
    context = multiprocessing.get_context("spawn")
    connection, remote = context.Pipe()
    process = context.Process(target=_view, args=(remote, *link.split("/#"), cameras), daemon=True)
    process.start()
    remote.close()
    connection.recv_bytes()  # every image has been read once
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
