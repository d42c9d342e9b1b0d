"""Logging as text or as one JSON object per line.

    {"time": "2026-11-24T22:05:01.123Z", "level": "INFO", "logger": "rlrc.runtime.servers.openpi", "message": "...",
     "protocol": "openpi", "client": "127.0.0.1", "outcome": "observation"}

Further fields of a record are passed as ``extra={"fields": {...}}``. To keep clients from filling the log, a repeated
line is written once and then counted ("1,347 times more in 24 s: ..."), as are lines of one kind beyond ``LINES``.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rlrc.runtime.wire.ports import RateLimit

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
SUMMARY_S = 30.0  # interval of counts; a line that was not repeated for so long is new again
LINES, LINE_S = 30, 2.0  # burst of lines of one kind, and seconds per further line
NUMBER = re.compile(r"\d+")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        values: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """One line per message; control characters are escaped."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(
            character if character.isprintable() else ascii(character)[1:-1] for character in record.message
        )
        return super().formatMessage(record)


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # subscriptable from Python 3.11
    _StreamHandler = logging.StreamHandler


@dataclass
class _Line:
    """The last record that was not written, the number of such records, and the time of the first."""

    last: logging.LogRecord
    since: float
    number: int = 0


class RateLimitedHandler(_StreamHandler):
    """Writes a new line at once, and counts lines that differ only in numbers (ports, sizes)."""

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
        """Write the counts; also called at exit."""
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
                else:  # not repeated
                    del self._lines[key]
            if self._lines:
                self._count_later()
        finally:
            self.release()


def _strip(record: logging.LogRecord, **changes: Any) -> logging.LogRecord:
    """A copy without arguments and traceback, which may refer to a client's message."""
    values = {**record.__dict__, "msg": record.getMessage(), "args": (), "exc_info": None, "exc_text": None}
    return logging.makeLogRecord(values | changes)


def _summarize(line: _Line, what: str) -> logging.LogRecord:
    seconds = max(1, round(time.monotonic() - line.since))
    message = f"{line.number:,} {what} more in {seconds:,} s: {line.last.getMessage()}"
    return _strip(
        line.last, msg=message, created=time.time(), fields=getattr(line.last, "fields", {}) | {what: line.number}
    )


def configure(form: Literal["text", "json"]) -> None:
    """Log to stderr from level INFO."""
    handler = RateLimitedHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """The ``extra`` argument of a log call."""
    return {"fields": values}
