"""The page's process: started before the loop, asked for nothing while it runs, ended with it."""

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
NICE = 10  # the loop and inference go first


class Page:
    """``hello`` is what does not change: see server.py. Raises UserError if the port is taken.

    ``link`` has the token behind ``#``, which a browser does not send; it is drawn if there is none. ``stop`` is the
    port that the page sends its stops to first; the caller has to listen to it (StopSwitch.over, or its ``watch``).
    """

    def __init__(self, hello: Mapping[str, Any], cameras: Sequence[str], address: Address) -> None:
        import aiohttp  # noqa: F401  the extra "serve": better missing here than in the other process

        self.token = address.token or secrets.token_urlsafe(16)
        self.stop = StopPort(address.host, address.stop)
        self.feed = Feed(cameras)
        context = multiprocessing.get_context("spawn")
        arguments = (self.feed.ends, {**hello, "stop": self.stop.port}, address, self.token)
        self._process = context.Process(target=_main, args=arguments, name="operator's page", daemon=True)
        self._process.start()
        self.feed.ends.socket.close()  # so that ours reports the end when it dies
        try:
            self.port = self._opened(address)
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

    def _opened(self, address: Address) -> int:
        deadline = time.monotonic() + OPENING_S
        while time.monotonic() < deadline:
            told = self.feed.receive()
            if told is None:
                break
            if told and "port" in told[0]:
                return int(told[0]["port"])
            if told:
                where = f"{address.host}, found {address.port}: {told[0]['error']}"
                raise UserError(f"expected a free port for the page on {where}; give another")
            time.sleep(0.02)
        raise UserError("expected the operator's page to start, found that it did not; what it printed above says why")


def _main(ends: FeedEnds, hello: dict[str, Any], address: Address, token: str) -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)  # whoever started us ends us, when the robot is at rest
    os.nice(NICE)
    from rlrc.runtime.page.server import serve

    serve(ends, hello, address, token)
