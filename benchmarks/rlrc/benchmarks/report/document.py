"""A report as a list of sections, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DASH = "\u2013"


@dataclass(frozen=True)
class Cell:
    """``below`` stands under it in small print; a ``verdict`` is coloured and marked."""

    text: str
    below: str = ""
    verdict: bool = False


@dataclass(frozen=True)
class ReportTable:
    """The row ``strong`` stands out; with ``words`` the last column is running text. ``folded``: see Listing."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    strong: int | None = None
    words: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Chart:
    """``svg``: of rlrc.benchmarks.report.charts. ``name``: of its file, where it gets one."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Charts:
    """Beside each other where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Note:
    text: str


@dataclass(frozen=True)
class Listing:
    """``folded``: the title under which it hides, for what few want to read."""

    lines: Sequence[str]
    folded: str = ""


@dataclass(frozen=True)
class Terms:
    facts: Mapping[str, object]
    folded: str = ""


@dataclass(frozen=True)
class CommandLine:
    text: str


@dataclass(frozen=True)
class Tiles:
    """A large figure and what it is, each."""

    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class FilmStrip:
    """A strip of uint8 (H, W, 3), each with what it shows and what stands under it."""

    pictures: Sequence[tuple[NDArray[np.uint8], str, str]]


Block = ReportTable | Chart | Charts | Heading | Note | Listing | Terms | CommandLine | Tiles | FilmStrip


@dataclass(frozen=True)
class Section:
    """One without blocks is left out; one without a title stands by itself."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True)
class Document:
    title: str
    lead: str
    sections: Sequence[Section]

    def charts(self) -> list[Chart]:
        found: list[Chart] = []
        for section in self.sections:
            for block in section.blocks:
                found += [block] if isinstance(block, Chart) else block.charts if isinstance(block, Charts) else []
        return found


def cells(row: Sequence[str]) -> list[Cell]:
    return [Cell(text) for text in row]


def millions(number: int | None) -> str:
    return DASH if number is None else f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def megabytes(number: float | None) -> str:
    return DASH if number is None else f"{number / 1e6:.2f} MB" if number < 1e9 else f"{number / 1e9:.2f} GB"


def milliseconds(number: float | None) -> str:
    return DASH if number is None else f"{number:.2f} ms" if number < 1000 else f"{number / 1e3:.2f} s"
