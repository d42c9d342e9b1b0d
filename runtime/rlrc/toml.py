"""TOML, as people's editors write it."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(text: bytes) -> dict[str, Any]:
    """The tables of a file in UTF-8, with a byte order mark or without. Raises ValueError for what is no TOML."""
    try:
        return tomllib.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("endless nesting") from None
