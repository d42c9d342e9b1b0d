"""The server's log: what is repeated is counted, no client can fill it, one line is one line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable

import pytest

from rlrc.runtime.wire import logs, ports


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    for module in (logs, ports):
        monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    monkeypatch.setattr(logs.threading, "Timer", Waiting)
    return time


class Waiting:
    """A timer that runs when the test says so."""

    def __init__(self, _: float, call: Callable[[], None]) -> None:
        self.call, self.daemon = call, False

    def start(self) -> None: ...

    def cancel(self) -> None: ...


def logger(form: logging.Formatter | None = None) -> tuple[logging.Logger, logs.RateLimitedHandler, io.StringIO]:
    found, handler, written = logging.Logger("servers"), logs.RateLimitedHandler(), io.StringIO()
    handler.setStream(written)
    handler.setFormatter(form or logging.Formatter("%(message)s"))
    found.addHandler(handler)
    return found, handler, written


def test_a_line_that_is_repeated_is_counted(now: list[float]) -> None:
    log, handler, written = logger()
    for number in range(1348):  # every connection has a port of its own
        log.info("lerobot client %s: expected Ready first", f"ipv4:127.0.0.1:{50_000 + number}")
        now[0] += 24 / 1347
    log.info("another")
    first = "lerobot client ipv4:127.0.0.1:50000: expected Ready first\nanother\n"
    assert written.getvalue() == first
    handler._count()
    assert (
        written.getvalue()[len(first) :]
        == "1,347 times more in 24 s: lerobot client ipv4:127.0.0.1:51347: expected Ready first\n"
    )
    handler._count()  # nothing more: the next one is news again
    log.info("another")
    assert written.getvalue().endswith("Ready first\nanother\n")


def test_lines_of_garbage_that_all_differ_are_limited(now: list[float]) -> None:
    log, handler, written = logger()
    for number in range(5000):
        log.info("gr00t client 10.0.0.1: expected a map, found %s", chr(200 + number))
    log.warning("stopped: the page")  # of another level
    assert len(written.getvalue().splitlines()) == logs.LINES + 1
    now[0] += 10
    handler.close()
    assert written.getvalue().splitlines()[-1].startswith(f"{5000 - logs.LINES:,} lines more in 10 s: gr00t client")


def test_a_fault_that_is_repeated_has_its_traceback_once(now: list[float]) -> None:
    log, handler, written = logger()
    for text in ("here", "here", "there"):
        try:
            raise ValueError(text)
        except ValueError:
            log.exception("openpi client")
    handler.close()
    assert written.getvalue().count("Traceback") == 2
    assert written.getvalue().endswith("1 times more in 1 s: openpi client\n")


def test_counts_are_fields_of_the_json(now: list[float]) -> None:
    log, handler, written = logger(logs.JsonLines())
    for _ in range(3):
        log.info("client: %s", "busy", extra=logs.fields(protocol="openpi", outcome="busy"))
    handler.close()
    told = [json.loads(line) for line in written.getvalue().splitlines()]
    assert told[0]["outcome"] == told[1]["outcome"] == "busy"
    assert told[1]["times"] == 2
    assert "times" not in told[0]


def test_no_client_writes_lines_of_its_own() -> None:
    log, _, written = logger(logs.TextLines())
    log.info("client: %s", "expected a map, found x\n2026-11-30 INFO all is well\r\x1b[2J\x85é")
    (line,) = written.getvalue().splitlines()
    assert line.endswith(r"found x\n2026-11-30 INFO all is well\r\x1b[2J\x85é")
