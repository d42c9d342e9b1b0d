"""Which two policies of a real size are compared, on which runtime and in which precisions: operating_points.toml."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files

from rlrc import strict
from rlrc.errors import UserError

RUNTIMES = ("gguf", "onnxruntime")
FILE = "operating_points.toml"


@dataclass(frozen=True)
class OperatingPoint:
    """``name``: a geometry of rlrc.artifact.geometries. ``prune``: the share of the intermediate blocks to cut.
    ``eight``: patterns of tensors that stay in 8 bits. ``elsewhere``: the compressed policy's other runtime and its
    precisions there.
    """

    name: str
    prune: float
    eight: tuple[str, ...]
    runtime: str
    dense: str
    compressed: str | dict[str, str]
    elsewhere: tuple[str, str | dict[str, str]] | None = None


@dataclass(frozen=True)
class _Precisions:
    dense: str
    compressed: str | dict[str, str]


@dataclass(frozen=True)
class _Entry:
    prune: float
    eight: tuple[str, ...]
    gguf: _Precisions | None = None
    onnxruntime: _Precisions | None = None


def point(name: str, runtime: str | None = None) -> OperatingPoint:
    """``runtime`` None: the first that the geometry has. Raises UserError for an unknown name or runtime."""
    known = strict.read_toml(dict[str, _Entry], files("rlrc.benchmarks.claims") / FILE)
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, 0)
        raise UserError(f"expected a geometry of {', '.join(known)}, found {name!r}; the nearest is {close[0]}")
    entry = known[name]
    found = {other: getattr(entry, other) for other in RUNTIMES if getattr(entry, other) is not None}
    chosen = runtime or next(iter(found))
    if chosen not in found:
        raise UserError(
            f"expected a runtime of {', '.join(found)} for {name}, found {chosen!r}"
            + (", which takes no experts" if chosen == "gguf" else "")
            + "; choose one of those"
        )
    precisions = found[chosen]
    others = [(other, its.compressed) for other, its in found.items() if other != chosen]
    return OperatingPoint(
        name,
        entry.prune,
        entry.eight,
        chosen,
        precisions.dense,
        precisions.compressed,
        others[0] if others else None,
    )
