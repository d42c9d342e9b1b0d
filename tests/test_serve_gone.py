"""Nothing is computed for a client that has gone, by any protocol, and its place in the queue is free at once."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from clients import MESSAGES, LerobotClient, lerobot
from load_attacks import UPGRADE, masked
from serving import Served, wait_for
from test_serve_gr00t import HELLO, asked
from test_serve_lerobot import FEATURES, timed
from test_serve_openpi import observation, opened
from test_serve_openvla import OFT

from rlrc.artifact import PolicySpec
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.lerobot import LerobotServer
from rlrc.runtime.servers.refusal import ClientGone, RequestRefused
from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire import arrays, zmtp
from rlrc.runtime.wire.ports import Access

PROTOCOLS = ("openpi", "openvla", "gr00t", "lerobot")


@contextmanager
def held(served: Served) -> Iterator[None]:
    """The policy works on one observation, of a client that waits, and goes on at the end."""
    with opened(served) as first:
        os.kill(served.worker(), signal.SIGSTOP)
        try:
            first.send(arrays.pack(observation()))
            wait_for(lambda: waiting(served) == 1)
            yield
        finally:
            os.kill(served.worker(), signal.SIGCONT)
        assert arrays.unpack(first.recv(30))["actions"].shape == (3, 4)  # type: ignore[arg-type]


def waiting(served: Served) -> int:
    return int(metric(served, "rlrc_observations_waiting"))


def metric(served: Served, name: str) -> float:
    lines = served.get("/metrics")[1].splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(f"{name} ")), 0))


def ask_and_go(served: Served, protocol: str) -> Callable[[], None]:
    """Sends an observation -> what leaves without having read the answer."""
    port = served.ports[protocol]
    if protocol == "lerobot":
        return _lerobot(port)
    request = asked()
    body = json.dumps(OFT).encode()
    sent = {
        "openpi": UPGRADE + masked(0x2, arrays.pack(observation())),
        "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        "gr00t": HELLO + zmtp._encode_frame(zmtp.MORE, b"") + zmtp._encode_frame(0, request),
    }[protocol]
    peer = socket.create_connection(("127.0.0.1", port), timeout=5)
    peer.sendall(sent)
    return peer.close


def _lerobot(port: int) -> Callable[[], None]:
    client = LerobotClient(port)
    with lerobot():
        client.start(FEATURES)
        client.send_observation(timed(must_go=True))
    asking = client.stub_actions.future(MESSAGES["Empty"]())
    return lambda: (asking.cancel(), client.channel.close())[1]


@pytest.fixture(scope="module")
def served(toy_artifact: Path) -> Iterator[Served]:
    mapping = ("--mapping", "openvla", "openvla-oft", "--waiting", "3")
    with Served(toy_artifact, *mapping, protocols=PROTOCOLS) as running:
        yield running


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_nobody_waits_for_is_not_computed(served: Served, protocol: str) -> None:
    gone = f'rlrc_observations_total{{outcome="gone",protocol="{protocol}"}}'
    computed, before = metric(served, "rlrc_inference_seconds_count"), metric(served, gone)
    with held(served):
        for _ in range(2):  # one after the other: each finds a place, for the one before has left
            leave = [ask_and_go(served, protocol) for _ in range(2)]
            wait_for(lambda: waiting(served) == 3)
            for one in leave:
                one()
            wait_for(lambda: waiting(served) == 1)
    wait_for(lambda: waiting(served) == 0)
    assert metric(served, "rlrc_inference_seconds_count") == computed + 1
    assert protocol == "lerobot" or metric(served, gone) == before + 4  # gRPC cancels them without a word


def test_a_newer_observation_of_the_same_client_takes_the_place_of_the_older(served: Served) -> None:
    with lerobot(), LerobotClient(served.ports["lerobot"]) as client:
        client.start(FEATURES)
        answers: list[bytes] = []
        thread = threading.Thread(target=lambda: answers.append(client.get_actions()))
        with held(served):
            client.send_observation(timed(1))
            thread.start()
            wait_for(lambda: waiting(served) == 2)
            client.send_observation(timed(5, **{"shoulder.pos": 0.9}))
        thread.join()
        assert pickle.loads(answers[0])[0].timestep == 5
        assert client.get_actions() == b""  # there is nothing else


class Slow:
    """Half a second for every chunk."""

    def __init__(self, horizon: int, dim: int) -> None:
        self.actions = np.zeros((horizon, dim), np.float32)

    def infer(self, _: Any) -> dict[str, Any]:
        time.sleep(0.5)
        return {"actions": self.actions}

    def reset(self) -> None: ...


def test_a_deadline_before_its_turn_is_told_at_once(tiny_manifest: Any) -> None:
    spec: PolicySpec = tiny_manifest.policy

    async def serve() -> None:
        session = Session(spec)
        server = LerobotServer(session, observations.load("own", spec, None, "lerobot"), Access())
        await session.open(Slow, (spec.action.horizon, spec.action.dim))
        try:
            await asyncio.to_thread(ask, await server.start("127.0.0.1", 0))
        finally:
            await server.stop()
            session.close()

    def ask(port: int) -> None:
        with lerobot(), LerobotClient(port) as one, LerobotClient(port) as other:
            for client in (one, other):
                client.start(FEATURES)
                client.send_observation(timed(must_go=True))
            one.get_actions()  # now it is known what one takes
            one.send_observation(timed(must_go=True))
            first = one.stub_actions.future(MESSAGES["Empty"]())
            time.sleep(0.1)
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError) as refused:
                other.stub_actions(MESSAGES["Empty"](), timeout=0.3)
            assert time.monotonic() - begun < 0.3
            found: Any = refused.value
            assert found.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "expected a deadline after the 1 queued observations (about 0.5 s), found one in" in found.details()
            assert first.result().data

    asyncio.run(serve())


def test_the_queue_knows_who_still_waits(tiny_manifest: Any) -> None:
    spec: PolicySpec = tiny_manifest.policy

    async def ask() -> None:
        session, there = Session(spec, waiting=2), [True]
        await session.open(Slow, (spec.action.horizon, spec.action.dim))
        seen: list[Any] = []
        session.show = lambda given, *_: seen.append(given["instruction"])

        def given(words: str) -> dict[str, Any]:
            return {**observation(), "instruction": words}

        first = asyncio.ensure_future(session.infer(given("first")))
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(session.infer(given("gone"), lambda: there[0]))
        await asyncio.sleep(0)
        with pytest.raises(RequestRefused, match="expected fewer than 2"):
            await session.infer(given("refused"))
        there[0] = False
        latest = ["old"]
        last = asyncio.ensure_future(session.infer(lambda: given(latest[0])))
        await asyncio.sleep(0)
        latest[0] = "new"
        with pytest.raises(ClientGone):
            await gone
        await first
        cancelled = asyncio.ensure_future(session.infer(given("cancelled")))
        await asyncio.sleep(0)
        cancelled.cancel()
        with suppress(asyncio.CancelledError):
            await cancelled
        await last
        session.inference.seconds = 0.5
        one = asyncio.ensure_future(session.infer(given("one")))
        await asyncio.sleep(0)
        with pytest.raises(RequestRefused, match=r"after the 1 queued observations .about 0.5 s., found one in 0.2"):
            await session.infer(given("late"), within=0.2)
        await one
        await session.infer(given("alone"), within=0.01)  # nobody is before it
        session.close()
        assert seen == ["first", "new", "one", "alone"]

    asyncio.run(ask())
