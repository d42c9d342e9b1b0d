"""What /proc says of a process that goes on meanwhile: a file or thread that ends while it is listed is left out."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes that any thread of it started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += map(int, path.read_text().split())
    return found


def open_files(pid: int) -> list[str]:
    """What its descriptors are: paths, or the likes of ``socket:[123]``."""
    found = []
    for link in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            found.append(os.readlink(f"/proc/{pid}/fd/{link}"))
    return found
