"""The server's log: a line for people, or a JSON object a line for machines.

    {"time": "2026-11-24T22:05:01.123Z", "level": "INFO", "logger": "rlrc.runtime.servers.openpi", "message": "...",
     "protocol": "openpi", "client": "127.0.0.1", "outcome": "observation"}

What a record has beside its message is given as ``extra={"fields": {...}}``. No client can fill the log: a line that is
repeated is written once and then counted ("1,347 times more in 24 s: ..."), and so are more than ``LINES`` of one kind.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from rlrc.runtime.wire.ports import RateLimit

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
SUMMARY_S = 30.0  # how often counts are written, and after how long a line is new again
LINES, LINE_S = 30, 2.0  # of one kind at once, and seconds until one more may come
NUMBER = re.compile(r"\d+")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        told: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """One line for a message, whatever a client has put into it."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(
            character if character.isprintable() else ascii(character)[1:-1] for character in record.message
        )
        return super().formatMessage(record)


@dataclass
class _Line:
    """The last record of those that were not written, how many there are, and since when."""

    last: logging.LogRecord
    since: float
    number: int = 0


class RateLimitedHandler(logging.StreamHandler):
    """Writes a line at once, and of those that only differ in their numbers (ports, sizes) how often they came."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[tuple[str, ...], _Line] = {}
        self._allowed: dict[tuple[str, ...], RateLimit] = {}
        self._counter: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        kind = (record.name, record.levelname)
        error = record.exc_info[1] if record.exc_info else None
        key: tuple[str, ...] = (*kind, NUMBER.sub("#", record.getMessage()), NUMBER.sub("#", repr(error)))
        if key not in self._lines:
            if self._allowed.setdefault(kind, RateLimit(LINES, LINE_S)).spend():
                self._lines[key] = _Line(_strip(record), time.monotonic())
                super().emit(record)
                return self._count_later()
            key = kind
        line = self._lines.setdefault(key, _Line(record, time.monotonic()))
        if not line.number:
            line.since = time.monotonic()
        line.last, line.number = _strip(record), line.number + 1
        self._count_later()

    def close(self) -> None:
        """At the end of the program, too."""
        self._count()
        if self._counter is not None:
            self._counter.cancel()
        super().close()

    def _count_later(self) -> None:
        if self._counter is None:
            self._counter = threading.Timer(SUMMARY_S, self._count)
            self._counter.daemon = True
            self._counter.start()

    def _count(self) -> None:
        self.acquire()
        try:
            self._counter = None
            for key, line in list(self._lines.items()):
                if line.number:
                    super().emit(_summarize(line, "times" if len(key) > 2 else "lines"))
                    line.number = 0
                else:  # it is new again
                    del self._lines[key]
            if self._lines:
                self._count_later()
        finally:
            self.release()


def _strip(record: logging.LogRecord, **changes: Any) -> logging.LogRecord:
    """Without arguments and traceback, which may hold a client's message."""
    values = {**record.__dict__, "msg": record.getMessage(), "args": (), "exc_info": None, "exc_text": None}
    return logging.makeLogRecord(values | changes)


def _summarize(line: _Line, what: str) -> logging.LogRecord:
    seconds = max(1, round(time.monotonic() - line.since))
    message = f"{line.number:,} {what} more in {seconds:,} s: {line.last.getMessage()}"
    return _strip(
        line.last, msg=message, created=time.time(), fields=getattr(line.last, "fields", {}) | {what: line.number}
    )


def configure(form: Literal["text", "json"]) -> None:
    """On stderr, from INFO on."""
    handler = RateLimitedHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """``extra`` of a record."""
    return {"fields": values}
