"""Limits of the numbers in a configuration, with one form of error message."""

from __future__ import annotations

from rlrc.errors import UserError


def check_range(
    config: object,
    prefix: str,
    *names: str,
    at_least: float | None = None,
    above: float | None = None,
    within: tuple[float, float] | None = None,
) -> None:
    """Check these fields of ``config``; NaN is outside every range, None (not given) is not checked.

    ``prefix`` stands before a field's name in the message, such as "sft." or "--". Raises UserError.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if at_least is not None and not value >= at_least:
            raise UserError(f"expected {prefix}{name} >= {at_least}, found {value}")
        if above is not None and not value > above:
            raise UserError(f"expected {prefix}{name} > {above}, found {value}")
        if within is not None and not within[0] <= value <= within[1]:
            raise UserError(f"expected {prefix}{name} within [{within[0]}, {within[1]}], found {value}")
