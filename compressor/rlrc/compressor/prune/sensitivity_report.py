"""sensitivity.json, which ``rlrc sensitivity`` writes and ``rlrc prune --allocation sensitivity`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlrc import strict
from rlrc.errors import UserError

Kind = Literal["prune", "quantize", "drop"]
KINDS: tuple[Kind, ...] = ("prune", "quantize", "drop")


@dataclass(frozen=True)
class SensitivityRow:
    """``module``: its name in the state dict; ``parameters``: its size; ``error``: in normalised actions."""

    module: str
    kind: Kind
    error: float
    parameters: int


@dataclass(frozen=True)
class SensitivityReport:
    """sensitivity.json. ``digest`` of the artifact (None for an official checkpoint)."""

    kind: Literal["sensitivity"]
    source: str
    digest: str | None
    ratio: float
    bits: int
    observations: int
    modules: tuple[SensitivityRow, ...]


def load_report(file: Path) -> SensitivityReport:
    """Read a report. Raises UserError if the file is not one."""
    try:
        return strict.decode(SensitivityReport, strict.parse(file.read_bytes()))
    except OSError as error:
        raise UserError(f"expected a sensitivity report at {file}, found: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{error}, in {file}; make it again with rlrc sensitivity") from None


def errors_by_block(report: SensitivityReport, kind: Kind, tower: str) -> dict[int, float]:
    """The error of every measured block of the tower; for "quantize", the sum over its modules."""
    found: dict[int, float] = {}
    for row in report.modules:
        name, *rest = row.module.split(".")
        if (row.kind, name) == (kind, tower) and rest[0] == "layers":
            found[int(rest[1])] = found.get(int(rest[1]), 0.0) + row.error
    if not found:
        raise UserError(
            f"expected blocks of the {tower} with the kind {kind} in the sensitivity report of {report.source}, found "
            f"none; make it again with rlrc sensitivity --kinds {kind}"
        )
    return found
