"""The few pieces of HTML that the report is made of. Every text is escaped here, except ready-made cells."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

DASH = "\u2013"


def section(title: str, body: str) -> str:
    """Nothing for an empty body."""
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def figure(svg: str, caption: str) -> str:
    return f'<figure><div class="scroll" tabindex="0">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def cell(text: str, below: str = "") -> str:
    """The inside of a table cell; ``below`` stands under it in small print."""
    return escape(text) + (f"<small>{escape(below)}</small>" if below else "")


def verdict(word: str) -> str:
    return f'<span class="{escape(word.split()[0])}">{escape(word)}</span>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], strong: int | None = None, words: bool = False) -> str:
    """``rows`` hold ready-made cells; the row ``strong`` stands out; with ``words`` the last column is running text."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in header)
    body = ""
    for i, (first, *others) in enumerate(rows):
        kinds = ["" for _ in others]
        if words:
            kinds[-1] = ' class="words"'
        cells = "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, others, strict=True))
        hero = ' class="hero"' if i == strong else ""
        body += f'<tr{hero}><th scope="row">{first}</th>{cells}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def terms(facts: Mapping[str, object]) -> str:
    pairs = "".join(f"<dt>{escape(term)}</dt><dd>{escape(str(text))}</dd>" for term, text in facts.items())
    return f"<dl>{pairs}</dl>"


def picture(pixels: NDArray[np.uint8], alt: str, caption: str) -> str:
    """uint8 (H, W, 3) as an image inside the page."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return f'<figure><img alt="{escape(alt)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'


def millions(number: int | None) -> str:
    return DASH if number is None else f"{number / 1e6:.2f} M"


def megabytes(number: int | None) -> str:
    return DASH if number is None else f"{number / 1e6:.2f} MB"


def milliseconds(number: float | None) -> str:
    return DASH if number is None else f"{number:.2f} ms"
