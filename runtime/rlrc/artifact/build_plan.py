"""graphs/tensorrt/plan.json: how to build TensorRT engines from an artifact's graphs. Needs the standard library only.

The exporter writes it; `rlrc jetson build` carries it out on the device. Engines fit one GPU and one release of
TensorRT, so they are cached and are not part of the artifact.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlrc.artifact.precisions import TensorRTPrecision
from rlrc.artifact.spec import TensorSpec
from rlrc.errors import UserError
from rlrc.strict import StrictError, decode, encode, parse

PLAN = "graphs/tensorrt/plan.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Bounds:
    """The smallest, the usual and the largest shape of an input in one optimisation profile."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class GraphPlan:
    """``files``: the graph first, then its external data; paths relative to the artifact, with their sha256.

    Every profile bounds every input. One engine holds all profiles; each pass uses the first that its shapes fit.
    """

    name: str
    files: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, Bounds], ...]


@dataclass(frozen=True)
class BuildPlan:
    """``least_sm``: the lowest compute capability that supports the precision, 87 for 8.7.

    ``int4_block``: how many inputs share a scale of 4-bit weights; None if there are none.
    """

    precision: TensorRTPrecision
    tensorrt: str
    """the oldest release that reads the graphs, such as "10.3" """
    least_sm: int
    workspace_bytes: int
    graphs: tuple[GraphPlan, ...]
    int4_block: int | None = None
    strongly_typed: Literal[True] = True
    format_version: int = FORMAT_VERSION


def read_plan(path: Path) -> BuildPlan:
    """Raises UserError for a file that is missing, damaged, of a later version, or inconsistent."""
    try:
        values = parse(path.read_bytes())
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise StrictError(f"expected format_version {FORMAT_VERSION}, found {version!r}")
        plan = decode(BuildPlan, values)
        check_plan(plan)
    except OSError as error:
        raise UserError(f"expected a build plan at {path}, found: {error.strerror}; run rlrc export again") from None
    except StrictError as error:
        raise UserError(f"{path}: {error}; run rlrc export again") from None
    return plan


def write_plan(plan: BuildPlan, path: Path) -> None:
    check_plan(plan)
    path.write_text(json.dumps(encode(plan), indent=1) + "\n")


def check_plan(plan: BuildPlan) -> None:
    """Raises StrictError unless every profile has, for every input, shapes that fit it with min <= opt <= max."""
    names = [graph.name for graph in plan.graphs]
    if not names or len(set(names)) != len(names):
        raise StrictError(f"expected graphs with distinct names, found {', '.join(names) or 'none'}")
    for graph in plan.graphs:
        if not graph.files or not graph.profiles:
            raise StrictError(f"expected files and profiles of the graph {graph.name}, found none")
        for number, profile in enumerate(graph.profiles):
            where = f"profile {number} of the graph {graph.name}"
            declared = {tensor.name: tensor.shape for tensor in graph.inputs}
            if profile.keys() != declared.keys():
                raise StrictError(f"expected bounds of {', '.join(declared)} in {where}, found {', '.join(profile)}")
            for name, bounds in profile.items():
                _check_bounds(bounds, declared[name], f"{name} in {where}")


def _check_bounds(bounds: Bounds, shape: tuple[int | str, ...], where: str) -> None:
    if not len(bounds.min) == len(bounds.opt) == len(bounds.max) == len(shape):
        raise StrictError(f"expected {len(shape)} dimensions of {where}, found {bounds}")
    for low, usual, high, size in zip(bounds.min, bounds.opt, bounds.max, shape, strict=True):
        if not 0 <= low <= usual <= high or (isinstance(size, int) and (low, high) != (size, size)):
            raise StrictError(f"expected bounds of {shape} in order for {where}, found {bounds}")


def fits(profile: dict[str, Bounds], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the profile allows inputs of these shapes."""

    def fit(shape: tuple[int, ...], bounds: Bounds) -> bool:
        return len(shape) == len(bounds.min) and all(
            low <= size <= high for low, size, high in zip(bounds.min, shape, bounds.max, strict=True)
        )

    return all(fit(shape, profile[name]) for name, shape in shapes.items())
