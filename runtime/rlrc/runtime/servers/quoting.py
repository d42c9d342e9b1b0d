"""Names and values that a client sent, quoted safely in messages of one line."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

MAX_NAMES = 12  # in one message


def list_names(names: Iterable[object]) -> str:
    """The first ``MAX_NAMES`` names, separated by commas."""
    first = list(islice(names, MAX_NAMES + 1))
    return ", ".join(map(escape_name, first[:MAX_NAMES])) + (", ..." if len(first) > MAX_NAMES else "") or "none"


def escape_name(name: object) -> str:
    """At most 40 characters of a name, in ASCII without control characters."""
    return ascii(str(name)[:40])[1:-1]


def describe_value(value: Any) -> str:
    """Numbers and texts as they are; the type of anything else."""
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**64):
        return str(value)
    if isinstance(value, int):
        return "an integer of more than 64 bits"
    return f"'{escape_name(value)}'" if isinstance(value, str) else type(value).__name__
