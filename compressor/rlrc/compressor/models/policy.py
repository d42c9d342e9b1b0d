"""What every family's torch policy is: preprocessed observations in, one chunk of normalised actions out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.errors import UserError

Geometry = TypeVar("Geometry")


@dataclass
class Inputs:
    """A batch of observations as rlrc.runtime.inference.preprocess makes them.

    ``pixels``: of every camera that is there, in the order of the policy's cameras, (B, H, W, C); ``ids`` (B, L),
    padded on the right where ``mask`` (B, L) is false (None: nothing is padded, or padding is read like any token);
    ``state`` (B, S) normalised; ``noise`` (B, horizon, width) of flow policies.
    """

    pixels: list[Tensor]
    ids: Tensor | None = None
    state: Tensor | None = None
    mask: Tensor | None = None
    noise: Tensor | None = None


@dataclass
class Outputs:
    """``actions`` float32 (B, horizon, dim), normalised.

    Of token policies also ``tokens`` (B, horizon, dim), ids of the vocabulary or bins, and ``logits`` (..., rows).
    """

    actions: Tensor
    tokens: Tensor | None = None
    logits: Tensor | None = None


class PolicyModule(nn.Module, ABC):
    """A family's policy. Its state dict's names are those of an artifact's weights.

    ``towers`` name their modules: ``towers["decoder"]`` is the geometry of ``policy.decoder``.
    """

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__()
        self.spec, self.towers = spec, towers

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pictures of one camera (B, H, W, C) -> image tokens (B, N, width). The exporters' graph "vision"."""

    @abstractmethod
    def act(self, inputs: Inputs) -> Outputs:
        """One chunk, by the decode driver of the family (rlrc.compressor.models.decode)."""


def parse_geometry(kind: type[Geometry], spec: PolicySpec) -> Geometry:
    """The family's own scalars as its dataclass, JSON lists as tuples. Raises UserError for missing or unknown keys."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.geometry.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(
            f'expected the geometry of family "{spec.family}", found: {error}; make the artifact again'
        ) from None
