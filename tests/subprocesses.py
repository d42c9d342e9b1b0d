"""Python in a process of its own, which imports the same sources as this one."""

from __future__ import annotations

import os
import sys


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | more
