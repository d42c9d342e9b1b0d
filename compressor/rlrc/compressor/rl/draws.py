"""The random numbers of a decision, from torch's generator or from one for each worker process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """From torch's generator of the CPU, whatever the policy's device: a seed means the same everywhere."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, the first dimension being the batch's rows."""
        return torch.randn(shape)

    def exponential(self, rows: Sequence[int], count: int) -> Tensor:
        """Numbers (len(rows), count) for these rows of the batch, which ascend."""
        return torch.empty(len(rows), count).exponential_()


class WorkerDraws(Draws):
    """For a batch of the decisions of several workers: each draws what it would draw alone.

    ``workers``: how many rows each has, and its generator.
    """

    def __init__(self, workers: Sequence[tuple[int, torch.Generator]]) -> None:
        self.workers = workers

    def normal(self, *shape: int) -> Tensor:
        return torch.cat([torch.randn((rows, *shape[1:]), generator=own) for rows, own in self.workers])

    def exponential(self, rows: Sequence[int], count: int) -> Tensor:
        drawn, first = list[Tensor](), 0
        for number, own in self.workers:
            if found := sum(first <= row < first + number for row in rows):
                drawn.append(torch.empty(found, count).exponential_(generator=own))
            first += number
        return torch.cat(drawn)


TORCH = Draws()
