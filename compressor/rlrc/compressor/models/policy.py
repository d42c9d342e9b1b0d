"""The interface of all families' torch policies: preprocessed observations -> one chunk of normalised actions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.device import upload
from rlrc.errors import UserError

Geometry = TypeVar("Geometry")


@dataclass
class Inputs:
    """A batch of observations, preprocessed by rlrc.runtime.inference.preprocess.

    ``pixels`` (B, H, W, C) of every present camera, in the policy's order of cameras; ``ids`` (B, L), padded on the
    right where ``mask`` (B, L) is false (None: no padding, or padding is read as tokens); ``state`` (B, S), normalised;
    ``noise`` (B, horizon, width) for flow policies. ``lengths``: how many ids of each row the mask leaves, known to the
    host without asking the device (None: read from the mask).
    """

    pixels: list[Tensor]
    ids: Tensor | None = None
    state: Tensor | None = None
    mask: Tensor | None = None
    noise: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """With every tensor changed."""
        given = (self.ids, self.state, self.mask, self.noise)
        ids, state, mask, noise = (None if x is None else change(x) for x in given)
        return Inputs([change(pixels) for pixels in self.pixels], ids, state, mask, noise, self.lengths)

    def to(self, device: torch.device) -> Inputs:
        return self.each(lambda tensor: upload(tensor, device))


def select_lengths(lengths: tuple[int, ...] | None, rows: slice | Tensor) -> tuple[int, ...] | None:
    """The lengths of these rows. Indices should be on the host."""
    if lengths is None:
        return None
    return lengths[rows] if isinstance(rows, slice) else tuple(lengths[row] for row in rows.tolist())


@dataclass
class Outputs:
    """``actions`` float32 (B, horizon, dim), normalised.

    Token policies add ``tokens`` (B, horizon, dim), ids of the vocabulary or bins, and ``logits`` (..., rows).
    """

    actions: Tensor
    tokens: Tensor | None = None
    logits: Tensor | None = None


class PolicyModule(nn.Module, ABC):
    """A family's policy. Its state dict has the names of an artifact's weights.

    ``towers["decoder"]`` is the geometry of the module ``policy.decoder``, and so on.
    """

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__()
        self.spec, self.towers = spec, towers

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pictures of one camera (B, H, W, C) -> image tokens (B, N, width). The exporters' graph "vision"."""

    @abstractmethod
    def act(self, inputs: Inputs) -> Outputs:
        """One chunk of actions, by the family's decode driver (rlrc.compressor.models.decode)."""


def parse_geometry(kind: type[Geometry], spec: PolicySpec) -> Geometry:
    """The family's own scalars as its dataclass, JSON lists as tuples. Raises UserError for missing or unknown keys."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.geometry.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(
            f'expected the geometry of family "{spec.family}", found: {error}; make the artifact again'
        ) from None
