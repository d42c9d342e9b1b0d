"""A report as one self-contained HTML page. All text is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from rlrc.benchmarks.report import document as doc


def page(document: doc.Document) -> str:
    style = (files("rlrc.benchmarks.report") / "report.css").read_text(encoding="utf-8")
    sections = "".join(_section(section) for section in document.sections if section.blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(document.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{escape(document.title)}</h1>
<p>{escape(document.lead)}</p></header>
{sections}
<footer>Written by <code>rlrc report</code>.</footer>
</main>
</body>
</html>
"""


def _section(section: doc.Section) -> str:
    body = "\n".join(_block(block) for block in section.blocks)
    return f"<section><h2>{escape(section.title)}</h2>\n{body}\n</section>\n" if section.title else body


def _block(block: doc.Block) -> str:
    if isinstance(block, doc.ReportTable):
        return _fold(_table(block), block.folded)
    if isinstance(block, doc.Chart):
        return _figure(block)
    if isinstance(block, doc.Charts):
        return f'<div class="charts">{"".join(_figure(chart) for chart in block.charts)}</div>'
    if isinstance(block, doc.Heading):
        return f"<h3>{escape(block.text)}</h3>"
    if isinstance(block, doc.Note):
        return f'<p class="note">{escape(block.text)}</p>'
    if isinstance(block, doc.Listing):
        return _fold(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in block.lines)}</ul>", block.folded)
    if isinstance(block, doc.Terms):
        return _fold(_terms(block.facts), block.folded)
    if isinstance(block, doc.CommandLine):
        return f"<pre>{escape(block.text)}</pre>"
    if isinstance(block, doc.Tiles):
        tiles = (f"<div class=tile><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in block.tiles)
        return f'<div class="tiles">{"".join(tiles)}</div>'
    return f'<div class="film" tabindex="0">{"".join(_picture(*one) for one in block.pictures)}</div>'


def _figure(chart: doc.Chart) -> str:
    caption = f"<figcaption>{escape(chart.caption)}</figcaption>"
    return f'<figure><div class="scroll" tabindex="0">{chart.svg}</div>{caption}</figure>'


def _cell(cell: doc.Cell) -> str:
    if cell.verdict:
        return f'<span class="{escape(cell.text.split()[0])}">{escape(cell.text)}</span>'
    return escape(cell.text) + (f"<small>{escape(cell.below)}</small>" if cell.below else "")


def _table(table: doc.ReportTable) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.header)
    body = ""
    for i, (first, *others) in enumerate(table.rows):
        kinds = ["" for _ in others]
        if table.words:
            kinds[-1] = ' class="words"'
        texts = "".join(f"<td{kind}>{_cell(one)}</td>" for kind, one in zip(kinds, others, strict=True))
        hero = ' class="hero"' if i == table.strong else ""
        body += f'<tr{hero}><th scope="row">{_cell(first)}</th>{texts}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def _terms(facts: Mapping[str, object]) -> str:
    pairs = "".join(f"<dt>{escape(term)}</dt><dd>{escape(format_value(text))}</dd>" for term, text in facts.items())
    return f"<dl>{pairs}</dl>"


def format_value(value: object) -> str:
    """Format a value as text; list items are separated by commas."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def _fold(body: str, title: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if title else body


def _picture(pixels: NDArray[np.uint8], alt: str, caption: str) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return f'<figure><img alt="{escape(alt)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'
