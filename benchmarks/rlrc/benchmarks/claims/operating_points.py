"""Read operating_points.toml: the full-size policies to compare, their runtimes and precisions."""

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
    """``name``: a geometry of rlrc.artifact.geometries. ``prune``: the share to cut from the intermediate blocks.
    ``eight``: patterns of tensors that stay in 8 bits. ``elsewhere``: a second runtime of the compressed policy and its
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
    """``runtime`` None: the geometry's first one. Raises UserError for an unknown name or runtime."""
    known = strict.read_toml(dict[str, _Entry], files("rlrc.benchmarks.claims") / FILE)
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, 0)
        raise UserError(f"expected a geometry of {', '.join(known)}, found {name!r}; the nearest is {close[0]}")
    entry = known[name]
    runtimes = {other: getattr(entry, other) for other in RUNTIMES if getattr(entry, other) is not None}
    chosen = runtime or next(iter(runtimes))
    if chosen not in runtimes:
        raise UserError(
            f"expected a runtime of {', '.join(runtimes)} for {name}, found {chosen!r}"
            + (", which does not support experts" if chosen == "gguf" else "")
            + "; choose one of those"
        )
    precisions = runtimes[chosen]
    others = [(other, each.compressed) for other, each in runtimes.items() if other != chosen]
    other = others[0] if others else None
    return OperatingPoint(name, entry.prune, entry.eight, chosen, precisions.dense, precisions.compressed, other)
