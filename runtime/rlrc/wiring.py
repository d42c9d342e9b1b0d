"""Maps from one set of names to another where no two may lead to the same thing: cameras, keys, parts of a state."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from rlrc.errors import UserError


def check_distinct(wires: Mapping[str, Hashable], source: str, what: str, where: str) -> None:
    """Raises UserError where two of ``what`` are wired to one ``source``; ``where`` is what to correct."""
    first: dict[Hashable, str] = {}
    for name, end in wires.items():
        if end in first:
            shown = ".".join(end) if isinstance(end, tuple) else end
            raise UserError(
                f"expected every {source} for one of the {what}, found {shown} for {first[end]} and {name}; "
                f"correct {where}"
            )
        first[end] = name
