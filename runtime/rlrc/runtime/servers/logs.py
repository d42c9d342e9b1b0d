"""The server's log: a line for people, or a JSON object a line for machines.

    {"time": "2026-11-24T22:05:01.123Z", "level": "INFO", "logger": "rlrc.runtime.servers.openpi", "message": "...",
     "protocol": "openpi", "client": "127.0.0.1", "outcome": "observation"}

What a record has beside its message is given as ``extra={"fields": {...}}``.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any, Literal

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


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


def begin(form: Literal["text", "json"]) -> None:
    """On stderr, from INFO on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """``extra`` of a record."""
    return {"fields": values}
