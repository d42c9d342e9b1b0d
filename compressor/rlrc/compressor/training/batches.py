"""What training consumes: observations as the policy takes them, and the chunks of actions that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlrc.compressor.models.policy import Inputs
from rlrc.runtime.inference.preprocess import ModelInputs


@dataclass
class Batch:
    """``actions`` normalised (B, K, D); ``real`` (B, K) is false for steps behind an episode's end (None: all are).

    ``times`` (B,) of flow policies: where between noise and actions the velocity is asked for (see losses.drawn).
    ``rows`` (B,): which rows of a training set these are, if it gives a row the same observation every time.
    """

    inputs: Inputs
    actions: Tensor
    real: Tensor | None = None
    times: Tensor | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def part(self, rows: slice | Tensor) -> Batch:
        """Some rows of the batch."""

        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        i = self.inputs
        inputs = Inputs([change(pixels) for pixels in i.pixels], of(i.ids), of(i.state), of(i.mask), of(i.noise))
        return Batch(inputs, change(self.actions), of(self.real), of(self.times), of(self.rows))

    def noisy(self, deviation: float) -> Batch:
        """With normal noise on the normalised state, drawn from torch's generator."""
        state = self.inputs.state
        if state is None or not deviation:
            return self
        return replace(self, inputs=replace(self.inputs, state=state + deviation * torch.randn_like(state)))


def collate(rows: Sequence[ModelInputs]) -> Inputs:
    """Observations with the same cameras as one batch; shorter prompts are padded on the right and masked."""
    pixels = [torch.from_numpy(np.stack(pictures)) for pictures in zip(*(row.pixels for row in rows), strict=True)]
    states = [row.state for row in rows if row.state is not None]
    state = torch.from_numpy(np.stack(states)) if states else None
    prompts = [row.ids for row in rows if row.ids is not None]
    if not prompts:
        return Inputs(pixels, state=state)
    lengths = torch.tensor([len(ids) for ids in prompts])
    length = int(lengths.max())
    ids = torch.from_numpy(np.stack([np.pad(ids, (0, length - len(ids))) for ids in prompts]))
    mask = torch.arange(length) < lengths[:, None]
    return Inputs(pixels, ids, state, None if bool(mask.all()) else mask)


class Batches(Protocol):
    """A training set that gives random batches, and where its generator is."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def draw(self, size: int) -> Batch: ...

    def state(self) -> Any:
        """Of the random generator, as JSON values."""
        ...

    def restore(self, state: Any) -> None: ...


@dataclass
class TrainingData:
    """What a stage trains on, and batches it must not train on, whose loss tells how well it learns."""

    batches: Batches
    held_out: list[Batch] = field(default_factory=list)
