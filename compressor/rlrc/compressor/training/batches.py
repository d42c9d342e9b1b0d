"""Batches for training: inputs of the policy, and the chunks of actions that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlrc.compressor.models.device import upload
from rlrc.compressor.models.policy import Inputs, select_lengths
from rlrc.runtime.inference.preprocess import ModelInputs


@dataclass
class Batch:
    """``actions`` normalised (B, K, D); ``real`` (B, K) is false for steps after an episode's end (None: all are real).

    ``times`` (B,) of flow policies: interpolation times between actions (0) and noise (1), see losses.draw_noise.
    ``rows`` (B,): indices in the training set, on the host, if a row's observation never changes.
    """

    inputs: Inputs
    actions: Tensor
    real: Tensor | None = None
    times: Tensor | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.actions)

    def part(self, rows: slice | Tensor) -> Batch:
        """Select rows. Indices should be on the host."""
        part = self._each(lambda x: x[rows if isinstance(rows, slice) else upload(rows, x.device)])
        part.inputs.lengths = select_lengths(self.inputs.lengths, rows)
        return part

    def to(self, device: torch.device) -> Batch:
        """On the device, except for ``rows``, which only the host reads."""
        return replace(self._each(lambda tensor: upload(tensor, device)), rows=self.rows)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        others = (None if x is None else change(x) for x in (self.real, self.times, self.rows))
        return Batch(self.inputs.each(change), change(self.actions), *others)

    def add_state_noise(self, deviation: float) -> Batch:
        """Add normal noise to the normalised state, drawn from torch's generator."""
        state = self.inputs.state
        if state is None or not deviation:
            return self
        return replace(self, inputs=replace(self.inputs, state=state + deviation * torch.randn_like(state)))


def collate(rows: Sequence[ModelInputs]) -> Inputs:
    """Stack observations with the same cameras. Shorter prompts are padded on the right and masked."""
    pixels = [torch.from_numpy(np.stack(pictures)) for pictures in zip(*(row.pixels for row in rows), strict=True)]
    states = [row.state for row in rows if row.state is not None]
    state = torch.from_numpy(np.stack(states)) if states else None
    prompts = [row.ids for row in rows if row.ids is not None]
    if not prompts:
        return Inputs(pixels, state=state)
    lengths = tuple(len(ids) for ids in prompts)
    longest = max(lengths)
    ids = torch.from_numpy(np.stack([np.pad(ids, (0, longest - len(ids))) for ids in prompts]))
    if min(lengths) == longest:
        return Inputs(pixels, ids, state)
    return Inputs(pixels, ids, state, torch.arange(longest) < torch.tensor(lengths)[:, None], lengths=lengths)


class Batches(Protocol):
    """A training set that draws random batches."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def draw(self, size: int) -> Batch: ...

    def state(self) -> Any:
        """State of the random generator, as JSON values."""
        ...

    def restore(self, state: Any) -> None: ...


@dataclass
class TrainingData:
    """The training set of a stage, and held-out batches to measure the loss on."""

    batches: Batches
    held_out: list[Batch] = field(default_factory=list)
