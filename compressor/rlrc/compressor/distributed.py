"""Training on several processes: those of ``accelerate launch``, or this one alone. Accelerate does the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn

PATIENCE = timedelta(hours=12)  # one process evaluates or plays demonstrations while the others wait


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        from accelerate import PartialState

        PartialState(timeout=PATIENCE).wait_for_everyone()


@contextmanager
def first() -> Iterator[None]:
    """What process 0 does before all others do the same: they find its files."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


class Team:
    """All processes that train one policy together (DDP or FSDP, as ``accelerate launch`` was told)."""

    def __init__(self) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self._accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.sharded: bool = self._accelerator.distributed_type == "FSDP"

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

    def gather(self, value: Tensor) -> Tensor:
        """(N,) of every process, which may differ, one after the other."""
        if self.size == 1:
            return value
        counts = self._accelerator.gather(torch.tensor([len(value)], device=self.device)).tolist()
        padded = value.new_zeros(max(counts)).to(self.device)
        padded[: len(value)] = value
        parts = self._accelerator.gather(padded).cpu().view(self.size, -1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Whole on every process, by the names of the module that was given to ``prepare``."""
        if not self.sharded:
            return dict(self._accelerator.unwrap_model(module).state_dict())
        from torch.distributed.checkpoint import state_dict as checkpoint

        options = checkpoint.StateDictOptions(full_state_dict=True)
        return cast(dict[str, Tensor], checkpoint.get_model_state_dict(module, options=options))

    def state(self, module: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Weights and what the optimiser knows, whole; every process has to call it."""
        known = optimizer.state_dict()
        # The library would make a step of zeros to find out what an optimiser is going to know.
        if self.sharded and known["state"]:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True)
            known = get_optimizer_state_dict(module, optimizer.optimizer, options=options)
        return {"weights": self.weights(module), "optimizer": known}

    def restore(self, module: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
        """What ``state`` gave, to as many processes."""
        if not self.sharded:
            self._accelerator.unwrap_model(module).load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["optimizer"])
            return
        from torch.distributed.checkpoint import state_dict as checkpoint

        options = checkpoint.StateDictOptions(full_state_dict=True)
        checkpoint.set_model_state_dict(module, saved["weights"], options=options)
        if saved["optimizer"]["state"]:
            inner = optimizer.optimizer
            checkpoint.set_optimizer_state_dict(module, inner, saved["optimizer"], options=options)

    def finish(self, policy: nn.Module, weights: dict[str, Tensor]) -> None:
        """Gives the policy these weights back, on the CPU and for evaluation."""
        policy.load_state_dict(weights)
        policy.requires_grad_(True).cpu().eval()
