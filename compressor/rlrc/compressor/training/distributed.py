"""Training on several processes: those of ``accelerate launch`` or torchrun, or this one alone. Accelerate does it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from rlrc import interrupts, processes
from rlrc.errors import UserError

PATIENCE = timedelta(hours=12)  # one process evaluates or plays demonstrations while the others wait


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _without_gpu() -> bool:
    """Whether to compute on the CPU, and talk through gloo."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()


def cores() -> int:
    """This process's share of the cores that the processes of this machine may use."""
    return max(1, processes.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def devices() -> tuple[str, ...]:
    """Types of the devices that this process computes on. Everything but training stays on the CPU."""
    accelerator = None if _without_gpu() else torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        from accelerate import PartialState

        PartialState(cpu=_without_gpu(), timeout=PATIENCE).wait_for_everyone()


@contextmanager
def first() -> Iterator[None]:
    """What process 0 does before all others do the same: they find its files."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


class Team:
    """All processes that train one policy together (DDP or FSDP2, as ``accelerate launch`` was told)."""

    def __init__(self) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self._accelerator = Accelerator(cpu=_without_gpu(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        if (self.rank, self.size) != (rank(), size()):  # each would train alone, and all but one for nothing
            raise UserError(
                f"expected {size()} processes that talk to each other, found {self.size}; launch them with accelerate "
                "launch --multi_gpu or with torchrun"
            )
        if self._accelerator.distributed_type == "FSDP" and not self._accelerator.is_fsdp2:
            raise UserError("expected FSDP of version 2, found version 1; give accelerate launch --fsdp_version 2")

    def together(self) -> AbstractContextManager[None]:
        """Within it a signal ends no process of several before the others: see run_state.Keeper."""
        return interrupts.hold() if self.size > 1 else nullcontext()

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

    def sharded(self, module: nn.Module) -> bool:
        """Whether each process has only a part of every weight (FSDP)."""
        if self.size == 1:
            return False
        from torch.distributed.tensor import DTensor

        return any(isinstance(parameter, DTensor) for parameter in module.parameters())

    def weights(self, module: nn.Module, part: str = "") -> dict[str, Tensor]:
        """Whole on every process, by their names in the module given to ``prepare``; of one part ("policy."), in it.

        Of sharded modules every process has to ask.
        """
        if self.sharded(module):
            whole: dict[str, Any] = _checkpoint().get_model_state_dict(module, options=_whole())
        else:
            whole = self._accelerator.unwrap_model(module).state_dict()
        return {name.removeprefix(part): tensor for name, tensor in whole.items() if name.startswith(part)}

    def load_weights(self, module: nn.Module, weights: dict[str, Tensor], part: str = "") -> None:
        """What ``weights`` gave."""
        whole: dict[str, Any] = {part + name: tensor for name, tensor in weights.items()}
        if self.sharded(module):
            _checkpoint().set_model_state_dict(module, whole, options=_whole(strict=not part))
        else:
            missing, unknown = self._accelerator.unwrap_model(module).load_state_dict(whole, strict=False)
            if unknown or any(name.startswith(part) for name in missing):
                raise RuntimeError(f"the weights do not fit: missing {missing}, unknown {unknown}")

    def optimizer_state(self, module: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Whole, as ``weights``; for as many processes."""
        state = optimizer.state_dict()
        # torch would make a step of zeros to find out what an optimiser is going to know.
        if not self.sharded(module) or not state["state"]:
            return state
        return _checkpoint().get_optimizer_state_dict(module, optimizer.optimizer, options=_whole())

    def load_optimizer(self, module: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """What ``optimizer_state`` gave."""
        if not self.sharded(module):
            optimizer.load_state_dict(state)
        elif state["state"]:
            _checkpoint().set_optimizer_state_dict(module, optimizer.optimizer, state, options=_whole())

    def finish(self, policy: nn.Module, weights: dict[str, Tensor]) -> None:
        """Gives the policy these weights, as plain tensors on the CPU, for evaluation."""
        for name, _ in list(policy.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            # load_state_dict would shard them again.
            setattr(policy.get_submodule(parent), leaf, nn.Parameter(weights[name].detach()))
        policy.requires_grad_(True).cpu().eval()


def _checkpoint() -> Any:
    """torch's own way to put the parts of sharded modules together. Imported when needed: rollout workers never do."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _whole(**options: bool) -> Any:
    return _checkpoint().StateDictOptions(full_state_dict=True, **options)
