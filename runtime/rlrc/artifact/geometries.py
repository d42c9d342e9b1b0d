"""The dimensions of official checkpoints, for machines without torch.

``python -m rlrc.compressor.checkpoints.geometry`` writes geometries.json from the checkpoints' configurations.
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
    """A policy without weights. ``modules``: parameters by module, without those that no action depends on."""

    policy: PolicySpec
    towers: dict[str, TowerSpec]
    modules: dict[str, int]


@dataclass(frozen=True)
class _GeometryFile:
    geometries: dict[str, Geometry]


@cache
def load_geometries() -> dict[str, Geometry]:
    return strict.decode(_GeometryFile, strict.parse(FILE.read_bytes())).geometries


def geometry(name: str) -> Geometry:
    """Raises UserError for an unknown name."""
    return load_geometries()[canonical_name(name)]


def canonical_name(name: str) -> str:
    """The name in geometries.json of a name or an alias. Raises UserError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in load_geometries():
        close = difflib.get_close_matches(name, load_geometries(), 1, 0)
        raise UserError(
            f"expected one of the geometries {', '.join(load_geometries())}, found {name!r}; the nearest is {close[0]}"
        )
    return name
