"""The graphs of every family, one module for each group of families, built from shared blocks.

A graph is written once, in terms of a builder's layers; the builder chooses operators and precision
(rlrc.exporters.graphs.builder). Inputs and outputs are those that the decode drivers pass
(rlrc.runtime.inference.interfaces).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.errors import UserError
from rlrc.exporters.graphs import act, flow, openvla, tiny
from rlrc.exporters.graphs.builder import Builder

Define = Callable[[Builder, PolicySpec, dict[str, TowerSpec]], None]

FAMILIES: Mapping[str, Mapping[str, Define]] = {
    "tiny": tiny.GRAPHS,
    "openvla": openvla.GRAPHS,
    "openvla-oft": openvla.OFT_GRAPHS,
    "pi0": flow.GRAPHS,
    "pi05": flow.GRAPHS,
    "smolvla": flow.GRAPHS,
    "act": act.GRAPHS,
}


def find_graphs(family: str) -> Mapping[str, Define]:
    """The family's graphs by name. Raises UserError for an unknown family."""
    if family not in FAMILIES:
        raise UserError(f"expected a family of {', '.join(FAMILIES)}, found {family!r}; upgrade rlrc to export it")
    return FAMILIES[family]
