"""Text of others as text that can be printed: in a log, on a terminal, in a header."""

from __future__ import annotations

JOINERS = "\u200c\u200d"  # of letters in Persian and Indian scripts, and of emoji


def printable(text: str, keep: str = "") -> str:
    """Control and format characters, lone surrogates and the like as ``?``; those of ``keep`` stay, and joiners.

    A terminal obeys escape sequences, a line feed begins another line of a log, and a lone surrogate cannot be encoded.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep or one in JOINERS else "?" for one in text)
