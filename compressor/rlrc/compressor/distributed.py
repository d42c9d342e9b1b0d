"""Training on several processes: those of ``accelerate launch``, or this one alone. Accelerate does the work."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


class Team:
    """All processes that train one policy together (DDP or FSDP, as ``accelerate launch`` was told)."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator()
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Both as the processes share them: on the device, gradients averaged over the processes in backward."""
        return self._accelerator.prepare(objective, optimizer)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, module: nn.Module, norm: float) -> float:
        """Scales all gradients down to this norm; -> their norm before."""
        trained = [p for p in module.parameters() if p.requires_grad]
        return float(self._accelerator.clip_grad_norm_(trained, norm))

    def mean(self, value: Tensor) -> float:
        """Over the processes."""
        return float(self._accelerator.reduce(value, "mean")) if self.size > 1 else value.item()
