"""Overhead of serving beyond inference: transport of observations and actions between two processes of one machine.

Two servers run the simulated arm's policy, which needs hardly any time, each in its own process: that of `rlrc serve`,
and a minimal one on the same libraries that calls the policy in its event loop without checks. They are called
alternately, so that other load affects both alike, and at a real-time priority where permitted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.server import ServerConnection, serve

from rlrc.benchmarks.control import simulated_arm
from rlrc.processes import die_with_parent
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.client import RemotePolicy
from rlrc.runtime.servers.key_mapping import OWN
from rlrc.runtime.servers.openpi import OpenpiServer
from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire.ports import Access

HZ = 50.0
TURN = 100  # successive calls of one server
COLD = 3  # first calls of a turn, with cold caches, which do not count
WARM = 50  # warm-up calls
PRIORITY = 5
Tick = Callable[[int], None]


def measure(size: tuple[int, int], cameras: int, calls: int, tick: Tick) -> Iterator[dict[str, Any]]:
    """Rows of milliseconds beyond inference: the client's time of a call less the policy's own."""
    names = (*(f"camera{index}" for index in range(cameras - 1)), "wrist")
    random = np.random.default_rng(0)
    images = {f"image.{name}": random.integers(0, 200, (*size, 3), np.uint8) for name in names}
    observation = {**images, "state": np.zeros(2, np.float32)}
    with ExitStack() as stack:
        priority = stack.enter_context(raise_priority())
        clients = {
            "minimal server": stack.enter_context(_client(_serve_minimal, size, names)),
            "rlrc serve": stack.enter_context(_client(_serve_openpi, size, names)),
        }
        for policy in clients.values():
            _time_calls(policy, observation, WARM)
        spent: dict[str, list[float]] = {name: [] for name in clients}
        for _ in range(-(-calls // TURN)):
            for name, policy in clients.items():
                spent[name] += _time_calls(policy, observation, COLD + TURN)[COLD:]
            tick(TURN)
    for name, milliseconds in spent.items():
        p50, p90, p99, most = np.percentile(milliseconds, (50, 90, 99, 100)).tolist()
        yield {
            "name": f"{name}, {cameras} x {size[1]} x {size[0]}",
            "calls": len(milliseconds),
            "priority": priority,
            "overhead_ms": {"p50": p50, "p90": p90, "p99": p99, "max": most},
        }


@contextmanager
def raise_priority() -> Iterator[str]:
    """Run this process and its children at a real-time priority, as on a robot, where Linux permits it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    except OSError as error:
        yield f"not raised: {error.strerror}"
        return
    try:
        yield f"SCHED_FIFO {PRIORITY}"
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _time_calls(policy: RemotePolicy, observation: Mapping[str, Any], calls: int) -> list[float]:
    spent = []
    for _ in range(calls):
        begun = time.perf_counter()
        timing = policy.infer(observation)["timing"]
        spent.append((time.perf_counter() - begun) * 1e3 - timing["decoder_ms"])
    return spent


@contextmanager
def _client(server: Any, size: tuple[int, int], names: tuple[str, ...]) -> Iterator[RemotePolicy]:
    context = multiprocessing.get_context("spawn")
    connection, remote = context.Pipe()
    process = context.Process(
        target=_run, args=(server, size, names, remote)
    )  # it starts a process, so it is no daemon
    process.start()
    remote.close()
    try:
        with RemotePolicy(f"ws://127.0.0.1:{connection.recv()}", timeout_s=30) as policy:
            yield policy
    finally:
        process.terminate()
        process.join()


def _run(server: Any, size: tuple[int, int], names: tuple[str, ...], port: Any) -> None:
    die_with_parent()
    asyncio.run(server(simulated_arm.spec(size, names, size[0]), port))


async def _serve_openpi(spec: Any, port: Any) -> None:
    session = Session(spec)
    server = OpenpiServer(session, observations.load(OWN, spec), Access())
    await session.open(simulated_arm.Circle, (HZ,))
    port.send(await server.start("127.0.0.1", 0))
    await asyncio.Event().wait()


async def _serve_minimal(spec: Any, port: Any) -> None:
    policy = simulated_arm.Circle(HZ)
    policy.reset()

    async def answer(connection: ServerConnection) -> None:
        await connection.send(msgpack.packb({}))
        async for message in connection:
            observation = msgpack.unpackb(message, object_hook=_array)
            begun = time.perf_counter()
            actions = policy.infer(observation)["actions"]
            timing = {"infer_ms": (time.perf_counter() - begun) * 1e3}
            await connection.send(msgpack.packb({"actions": actions, "policy_timing": timing}, default=_pack))

    async with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
        port.send(next(iter(server.sockets)).getsockname()[1])
        await server.wait_closed()


def _array(values: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in values:
        return values
    return np.frombuffer(values[b"data"], values[b"dtype"]).reshape(values[b"shape"])


def _pack(array: NDArray[Any]) -> dict[bytes, Any]:
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}
