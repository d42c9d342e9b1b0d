"""Real-time chunking (arXiv 2506.07339): a new chunk continues the one that is being executed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import ActionSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import normalise


@dataclass(frozen=True)
class Continuation:
    """``previous`` (n, dim): the current chunk's actions for the first n steps of the new one, in action units.

    The first ``frozen`` of them will have been sent by the time the new chunk is computed, so it must begin with them.
    """

    previous: NDArray[np.float32]
    frozen: int

    @property
    def sent(self) -> NDArray[np.float32]:
        """The frozen actions (frozen, dim)."""
        return self.previous[: self.frozen]

    def without_future(self) -> Continuation:
        """Only the frozen actions."""
        return Continuation(self.sent, self.frozen)

    def check(self, action: ActionSpec) -> None:
        """Raises UserError if the shapes do not fit the policy's chunks."""
        n = len(self.previous) if self.previous.ndim == 2 else -1
        if self.previous.shape != (n, action.dim) or not 0 <= self.frozen <= n <= action.horizon:
            raise UserError(
                f"expected up to {action.horizon} previous actions of {action.dim} dimensions, some of them frozen, "
                f"found {self.previous.shape} and {self.frozen}; take them from the policy's last chunk"
            )

    def inpaint(
        self, x: NDArray[np.float32], noise: NDArray[np.float32], t: float, action: ActionSpec
    ) -> NDArray[np.float32]:
        """Blends the previous actions, at the noise level of the flow's time t, into x (B, horizon, width).

        As in RePaint (arXiv 2201.09865), with the soft mask of real-time chunking. The guidance of real-time chunking
        itself needs the gradient of the velocity, which inference graphs do not have.
        """
        known, mask = normalise(self.previous, action.norm), soft_mask(len(self.previous), self.frozen)
        part, weights = np.s_[:, : len(known), : action.dim], mask[:, None].astype(np.float32)
        result: NDArray[np.float32] = x.copy()
        result[part] = (1 - weights) * x[part] + weights * (np.float32(t) * noise[part] + np.float32(1 - t) * known)
        return result


def soft_mask(count: int, frozen: int) -> NDArray[np.float64]:
    """Weights of ``count`` previous actions: 1 for the frozen ones, then decreasing (arXiv 2506.07339, equation 5)."""
    c = (count - np.arange(frozen, count)) / (count - frozen + 1)
    return np.concatenate([np.ones(frozen), c * np.expm1(c) / np.expm1(1)])
