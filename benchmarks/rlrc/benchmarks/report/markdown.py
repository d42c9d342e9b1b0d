"""A report as Markdown, with charts as SVG files in a folder next to it. Film strips appear in HTML only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import unescape
from pathlib import Path

from rlrc.benchmarks.report import document as doc
from rlrc.benchmarks.report.charts import standalone
from rlrc.benchmarks.report.html import format_value
from rlrc.benchmarks.results.results import write


def save(document: doc.Document, out: Path) -> list[Path]:
    """Write ``out`` and its charts, the latter to ``out`` without its suffix. Returns all files, ``out`` first."""
    folder = out.with_suffix("")
    files = {folder / f"{chart.name}.svg": standalone(chart.svg) for chart in document.charts()}
    if files:
        folder.mkdir(parents=True, exist_ok=True)
    for file, svg in files.items():
        write(file, svg)
    write(out, text(document, folder.name))
    return [out, *files]


def text(document: doc.Document, folder: str) -> str:
    """``folder``: the charts' folder, relative to the page."""
    parts = [f"# {document.title}", document.lead]
    parts += [_section(section, folder) for section in document.sections if section.blocks]
    return "\n\n".join([*parts, "Written by `rlrc report`."]) + "\n"


def _section(section: doc.Section, folder: str) -> str:
    blocks = [written for block in section.blocks if (written := _block(block, folder))]
    return "\n\n".join([f"## {_escape(section.title)}"] * bool(section.title) + blocks)


def _block(block: doc.Block, folder: str) -> str:
    if isinstance(block, doc.ReportTable):
        return _fold(_table(block), block.folded)
    if isinstance(block, doc.Chart):
        label = re.search(r'aria-label="([^"]*)"', block.svg)
        alt = unescape(label[1]) if label else block.name
        return f"![{_escape(alt)}]({folder}/{block.name}.svg)\n\n{_escape(block.caption)}"
    if isinstance(block, doc.Charts):
        return "\n\n".join(_block(chart, folder) for chart in block.charts)
    if isinstance(block, doc.Heading):
        return f"### {_escape(block.text)}"
    if isinstance(block, doc.Note):
        return _escape(block.text)
    if isinstance(block, doc.Listing):
        return _fold("\n".join(f"- {_escape(line)}" for line in block.lines), block.folded)
    if isinstance(block, doc.Terms):
        return _fold(_terms(block.facts), block.folded)
    if isinstance(block, doc.CommandLine):
        return "\n".join(f"    {line}" for line in block.text.splitlines())
    if isinstance(block, doc.Tiles):
        return "\n".join(f"- **{_escape(figure)}** {_escape(what)}" for figure, what in block.tiles)
    return ""


def _table(table: doc.ReportTable) -> str:
    marks = ["---", *("---:" for _ in table.header[1:])]
    if table.words:
        marks[-1] = "---"
    rows = [[_cell(cell, i == table.strong) for cell in row] for i, row in enumerate(table.rows)]
    lines = [[_escape(column) for column in table.header], marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: doc.Cell, strong: bool) -> str:
    words = _escape(cell.text)
    if words and (strong or cell.verdict):
        words = f"**{words}**"
    return f"{words} ({_escape(cell.below)})" if cell.below else words


def _terms(facts: Mapping[str, object]) -> str:
    return "\n".join(f"- {_escape(term)}: {_escape(format_value(value))}" for term, value in facts.items())


def _fold(body: str, title: str) -> str:
    return f"<details><summary>{_escape(title)}</summary>\n\n{body}\n\n</details>" if title else body


def _escape(words: str) -> str:
    """Escape Markdown markup and the separators of table cells."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(words.split()))
