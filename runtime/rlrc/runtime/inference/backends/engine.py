"""The interface of the engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Engine(Protocol):
    """A loaded set of graphs."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name. Ignores tensors that the graph has no input for; all others have the same batch size.

        For a graph that decodes token by token, the engine caches keys and values between passes: ``start`` and
        ``end``, int64 (1,), are the number of positions before and after the pass. A start of 0 clears the cache.
        Raises rlrc.runtime.inference.decode.NoAction if the engine fails.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Versions that a measurement on this engine depends on."""
        ...
