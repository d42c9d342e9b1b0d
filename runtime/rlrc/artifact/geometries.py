"""The real dimensions of official checkpoints, as the readers of their folders find them, for those who have no torch.

geometries.json is written by ``python -m rlrc.compressor.checkpoints.geometry``, which holds the numbers that it comes
from.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlrc import strict
from rlrc.artifact.spec import PolicySpec, TowerSpec
from rlrc.errors import UserError

FILE = Path(__file__).with_suffix(".json")
ALIASES = {"smolvla": "smolvla-450m"}  # earlier names, accepted until 0.2


@dataclass(frozen=True)
class Geometry:
    """A policy without weights. ``modules``: parameters of each of its modules, without what no action depends on."""

    policy: PolicySpec
    towers: dict[str, TowerSpec]
    modules: dict[str, int]


@dataclass(frozen=True)
class _GeometryFile:
    geometries: dict[str, Geometry]


@cache
def known() -> dict[str, Geometry]:
    return strict.decode(_GeometryFile, strict.parse(FILE.read_bytes())).geometries


def geometry(name: str) -> Geometry:
    """Raises UserError for an unknown name."""
    return known()[canonical_name(name)]


def canonical_name(name: str) -> str:
    """The name in geometries.json of a name or an alias. Raises UserError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in known():
        close = difflib.get_close_matches(name, known(), 1, 0)
        raise UserError(
            f"expected one of the geometries {', '.join(known())}, found {name!r}; the nearest is {close[0]}"
        )
    return name
