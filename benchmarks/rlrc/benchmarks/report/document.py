"""A report as a list of sections, independent of the output format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DASH = "\u2013"


@dataclass(frozen=True)
class Cell:
    """``below``: small print under the text. A ``verdict`` is coloured and marked."""

    text: str
    below: str = ""
    verdict: bool = False


@dataclass(frozen=True)
class ReportTable:
    """Row ``strong`` is highlighted. ``words``: the last column is running text. ``folded``: see Listing."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    strong: int | None = None
    words: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Chart:
    """``svg``: from rlrc.benchmarks.report.charts. ``name``: stem of the file in a Markdown report."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Charts:
    """Charts placed side by side if the page is wide enough."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Note:
    text: str


@dataclass(frozen=True)
class Listing:
    """``folded``: the title of a collapsed block that contains the lines; empty: not collapsed."""

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
    """Pairs of a large figure and its description."""

    tiles: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class FilmStrip:
    """Pictures, uint8 (H, W, 3), each with alternative text and a caption."""

    pictures: Sequence[tuple[NDArray[np.uint8], str, str]]


Block = ReportTable | Chart | Charts | Heading | Note | Listing | Terms | CommandLine | Tiles | FilmStrip


@dataclass(frozen=True)
class Section:
    """Sections without blocks are omitted; a section without a title has no heading."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True)
class Document:
    title: str
    lead: str
    sections: Sequence[Section]

    def charts(self) -> list[Chart]:
        charts: list[Chart] = []
        for section in self.sections:
            for block in section.blocks:
                charts += [block] if isinstance(block, Chart) else block.charts if isinstance(block, Charts) else []
        return charts


def cells(row: Sequence[str]) -> list[Cell]:
    return [Cell(text) for text in row]


def millions(number: int | None) -> str:
    return DASH if number is None else f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def megabytes(number: float | None) -> str:
    return DASH if number is None else f"{number / 1e6:.2f} MB" if number < 1e9 else f"{number / 1e9:.2f} GB"


def milliseconds(number: float | None) -> str:
    return DASH if number is None else f"{number:.2f} ms" if number < 1000 else f"{number / 1e3:.2f} s"
