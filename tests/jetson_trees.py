"""Boards as trees of files below a folder, from tests/data/jetson/*.toml: paths and what is in them."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).parent / "data/jetson"


def plant(board: str, root: Path, **changes: str | None) -> Path:
    """Writes the board's files below ``root``; ``changes`` by a path with "/" as "__": None leaves a file out.

    A text that begins with "->" is where a link leads to.
    """
    files: dict[str, str | None] = tomllib.loads((DATA / f"{board}.toml").read_text(encoding="utf-8"))["files"]
    for path, text in (files | {name.replace("__", "/"): text for name, text in changes.items()}).items():
        if text is not None:
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("->"):
                file.symlink_to(text[2:].strip())
            else:
                file.write_text(text, encoding="utf-8")
    return root


def recorded() -> dict[str, str]:
    """Lines of tegrastats by the name in the comment before each."""
    lines = (DATA / "tegrastats.txt").read_text(encoding="utf-8").splitlines()
    return {
        above.split()[1]: line for above, line in pairwise(lines) if above.startswith("#") and not line.startswith("#")
    }
