"""What every engine of the artifact's graphs offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Engine(Protocol):
    """A set of graphs, loaded."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name, from the tensors that the graph has inputs for; the others are left aside.

        All have the same number of observations. Of a graph that decodes token by token the engine keeps the keys and
        values from pass to pass: ``start`` says how many positions came before, ``end`` how many there are after it
        (int64 (1,) each). At 0 nothing is kept. Raises rlrc.runtime.inference.decode.NoAction where the engine fails.
        """
        ...

    def versions(self) -> dict[str, str]:
        """What a measurement on this engine depends on."""
        ...
