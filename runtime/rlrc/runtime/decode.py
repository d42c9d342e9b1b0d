"""Decode drivers: from a decoder graph to a chunk of actions.

A driver is called with ``run``, which takes the decoder's inputs and returns its outputs by name, so that it may run
the graph once (parallel) or many times; it knows neither the engine nor the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import ActionSpec
from rlrc.runtime.preprocess import bin_centers, unnormalise

Tensors = Mapping[str, NDArray[Any]]
Run = Callable[[Tensors], Tensors]


class NoAction(RuntimeError):
    """The graphs gave nothing that a sound action could be made of. The robot gets none; the message says why."""


class Decoded(NamedTuple):
    """A batch of chunks: ``tokens`` int64 and ``actions`` float32, un-normalised; both (B, horizon, dim)."""

    tokens: NDArray[np.int64]
    actions: NDArray[np.float32]


def parallel(run: Run, inputs: Tensors, action: ActionSpec) -> Decoded:
    """All tokens of the chunk from one pass over the decoder (OpenVLA-OFT, arXiv 2502.19645, section 4).

    Raises NoAction for logits that are not finite or do not fit.
    """
    logits = run(inputs)["logits"]
    if logits.shape[1:] != (action.horizon, action.dim, action.bins):
        raise NoAction(f"expected logits (B, {action.horizon}, {action.dim}, {action.bins}), found {logits.shape}")
    if not np.isfinite(logits).all():
        raise NoAction(f"expected finite logits, found {np.count_nonzero(~np.isfinite(logits))} nan or inf")
    tokens = logits.argmax(-1)  # the first of equals
    return Decoded(tokens, actions_of(tokens, action))


def actions_of(tokens: NDArray[np.integer], action: ActionSpec) -> NDArray[np.float32]:
    """Bins (..., dim) -> un-normalised actions of the same shape."""
    return unnormalise(bin_centers(action.bins)[tokens], action.norm)
