"""Starts and ends the page's process. While the loop runs, it never waits for the page."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlrc.errors import UserError
from rlrc.processes import die_with_parent
from rlrc.runtime.control.stop_port import StopPort
from rlrc.runtime.page.feed import Address, Feed, FeedEnds
from rlrc.runtime.wire.ports import url

OPENING_S = 60.0
NICE = 10  # below the loop and inference


class Page:
    """``metadata``: see server.py. Raises UserError if the port is taken.

    ``link`` contains the token after ``#``, which browsers do not send; the default token is random. ``stop`` is the
    port that receives the page's stops first; the caller has to watch it (StopSwitch.source_of, or its ``watch``).
    """

    def __init__(self, metadata: Mapping[str, Any], cameras: Sequence[str], address: Address) -> None:
        import aiohttp  # noqa: F401  fail here, not in the other process, if the extra "serve" is missing

        self.token = address.token or secrets.token_urlsafe(16)
        self.stop = StopPort(address.host, address.stop)
        self.feed = Feed(cameras)
        context = multiprocessing.get_context("spawn")
        arguments = (self.feed.ends, {**metadata, "stop": self.stop.port}, address, self.token)
        self._process = context.Process(target=_main, args=arguments, name="operator's page", daemon=True)
        self._process.start()
        self.feed.ends.socket.close()  # so that our end reports when the process dies
        try:
            self.port = self._wait_for_port(address)
            self.stop.start(self.token, address.certificate, address.key, self.port)
        except BaseException:
            self.close()
            raise
        scheme = "http" if address.certificate is None else "https"
        self.url = url(scheme, address.host, self.port)

    @property
    def link(self) -> str:
        return f"{self.url}/#{self.token}"

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def close(self) -> None:
        self.stop.close()
        self._process.kill()
        self._process.join()
        self.feed.close()

    def _wait_for_port(self, address: Address) -> int:
        deadline = time.monotonic() + OPENING_S
        while time.monotonic() < deadline:
            messages = self.feed.receive()
            if messages is None:
                break
            if messages and "port" in messages[0]:
                return int(messages[0]["port"])
            if messages:
                where = f"{address.host}, found {address.port}: {messages[0]['error']}"
                raise UserError(f"expected a free port for the page on {where}; choose another")
            time.sleep(0.02)
        raise UserError("expected the operator's page to start, found that it did not; see its messages above")


def _main(ends: FeedEnds, metadata: dict[str, Any], address: Address, token: str) -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)  # the parent ends this process, once the robot is at rest
    os.nice(NICE)
    from rlrc.runtime.page.server import serve

    serve(ends, metadata, address, token)
