"""Makes foreign text safe to print: in a log, on a terminal, in a header."""

from __future__ import annotations

JOINERS = "\u200c\u200d"  # join letters in Persian and Indian scripts, and emoji


def printable(text: str, keep: str = "") -> str:
    """Replaces characters that cannot be printed by ``?``, except those in ``keep`` and joiners.

    A terminal would obey escape sequences, a line feed would start a new line of a log, and a lone surrogate cannot be
    encoded.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep or one in JOINERS else "?" for one in text)
