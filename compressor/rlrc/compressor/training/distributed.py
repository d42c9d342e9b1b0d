"""Training on the processes of ``accelerate launch`` or torchrun, or on this one alone, through Accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlrc import interrupts, processes
from rlrc.compressor.models import device
from rlrc.compressor.models.nn.linear import list_block_types
from rlrc.errors import UserError

TIMEOUT = timedelta(hours=12)  # one process evaluates or plays demonstrations while the others wait


def rank() -> int:
    """The number of this process. Process 0 writes files."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _use_cpu() -> bool:
    """Whether to compute on the CPU and communicate through gloo."""
    return device.current().type == "cpu"


def cores() -> int:
    """This process's share of the cores that may be used on this machine."""
    return max(1, processes.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def devices() -> tuple[str, ...]:
    """Types of the devices that this process computes on. Golden answers and evaluation are the CPU's."""
    return tuple(dict.fromkeys(("cpu", device.current().type)))


def is_fsdp() -> bool:
    """Whether ``accelerate launch`` shards the weights, which then need one type."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def wait_for_all() -> None:
    """Block until all processes have called this."""
    if size() > 1:
        from accelerate import PartialState

        PartialState(cpu=_use_cpu(), timeout=TIMEOUT).wait_for_everyone()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in process 0 before all others, which then find its files."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


class Team:
    """The processes that train one policy together, with DDP or FSDP2 as configured by ``accelerate launch``."""

    def __init__(self) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        self._accelerator = Accelerator(cpu=_use_cpu(), kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        if (self.rank, self.size) != (rank(), size()):  # each would train alone
            raise UserError(
                f"expected {size()} connected processes, found {self.size}; launch them with accelerate "
                "launch --multi_gpu or with torchrun"
            )
        if self._accelerator.distributed_type == "FSDP" and not self._accelerator.is_fsdp2:
            raise UserError("expected FSDP of version 2, found version 1; give accelerate launch --fsdp_version 2")

    def together(self) -> AbstractContextManager[None]:
        """Hold signals if there are several processes, so that all stop at the same step: see run_state.Keeper."""
        return interrupts.hold() if self.size > 1 else nullcontext()

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Move both to the device and wrap them, so that backward averages gradients over the processes.

        FSDP wraps block by block where its wrap policy asks for the module's own choice (TRANSFORMER_BASED_WRAP).
        """
        cast(Any, objective)._no_split_modules = list_block_types(objective)
        # DDP copies what it broadcasts. Frozen weights are the same everywhere, and may be mapped.
        frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
        ignored = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignored(objective, frozen)  # type: ignore[no-untyped-call]
        prepared: tuple[nn.Module, Any] = self._accelerator.prepare(objective, optimizer)
        return prepared

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, module: nn.Module, norm: float) -> Tensor:
        """Scale the gradients down to this norm. -> their norm before, on the device, the same in all processes."""
        trained = [p for p in module.parameters() if p.requires_grad]
        found: Any = self._accelerator.clip_grad_norm_(trained, norm)
        whole: Tensor = found.full_tensor() if hasattr(found, "full_tensor") else found
        return whole

    def mean(self, value: Tensor) -> float:
        """Mean over the processes."""
        return self.means([value])[0]

    def means(self, values: Sequence[Tensor]) -> list[float]:
        """The mean of each number over the processes. The host waits once for all of them."""
        stacked = torch.stack([value.to(self.device, torch.float32) for value in values])
        found: list[float] = (self._accelerator.reduce(stacked, "mean") if self.size > 1 else stacked).tolist()
        return found

    def gather(self, value: Tensor) -> Tensor:
        """Concatenate the (N,) tensors of all processes, whose lengths may differ."""
        if self.size == 1:
            return value
        counts = self._accelerator.gather(torch.tensor([len(value)], device=self.device)).tolist()
        padded = value.new_zeros(max(counts)).to(self.device)
        padded[: len(value)] = value
        parts = self._accelerator.gather(padded).cpu().view(self.size, -1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def is_sharded(self, module: nn.Module) -> bool:
        """Whether each process holds only a part of every weight (FSDP)."""
        if self.size == 1:
            return False
        from torch.distributed.tensor import DTensor

        return any(isinstance(parameter, DTensor) for parameter in module.parameters())

    def weights(self, module: nn.Module, part: str = "") -> dict[str, Tensor]:
        """The whole weights, by their names in the module given to ``prepare``.

        ``part``, such as "policy.", selects the names with this prefix and removes it. For sharded modules all
        processes must call this.
        """
        if self.is_sharded(module):
            whole: dict[str, Any] = _checkpoint().get_model_state_dict(module, options=_full_state_options())
        else:
            whole = self._accelerator.unwrap_model(module).state_dict()
        return {name.removeprefix(part): tensor for name, tensor in whole.items() if name.startswith(part)}

    def load_weights(
        self, module: nn.Module, weights: dict[str, Tensor], part: str = "", partial: bool = False
    ) -> None:
        """Load the result of ``weights``, or with ``partial`` some of them."""
        whole: dict[str, Any] = {part + name: tensor for name, tensor in weights.items()}
        if self.is_sharded(module):
            _checkpoint().set_model_state_dict(module, whole, options=_full_state_options(strict=not part))
        else:
            missing, unknown = self._accelerator.unwrap_model(module).load_state_dict(whole, strict=False)
            if unknown or (not partial and any(name.startswith(part) for name in missing)):
                raise RuntimeError(f"the weights do not fit: missing {missing}, unknown {unknown}")

    def optimizer_state(self, module: nn.Module, optimizer: Any) -> dict[str, Any]:
        """The whole state, as in ``weights``; it fits the same number of processes."""
        state: dict[str, Any] = optimizer.state_dict()
        # Before the first step torch would initialise the state by a step with zero gradients.
        if self.is_sharded(module) and state["state"]:
            state = _checkpoint().get_optimizer_state_dict(module, optimizer.optimizer, options=_full_state_options())
        return state

    def load_optimizer(self, module: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Load the result of ``optimizer_state``."""
        if not self.is_sharded(module):
            optimizer.load_state_dict(state)
        elif state["state"]:
            _checkpoint().set_optimizer_state_dict(module, optimizer.optimizer, state, options=_full_state_options())

    def finish(self, policy: nn.Module, weights: dict[str, Tensor]) -> None:
        """Set the policy's weights as plain tensors on the CPU, in evaluation mode."""
        for name, _ in list(policy.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            # load_state_dict would shard them again, and Module.cpu expects them to be sharded.
            setattr(policy.get_submodule(parent), leaf, nn.Parameter(weights[name].detach().cpu()))
        for module in policy.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.cpu()
        policy.requires_grad_(True).eval()


def _checkpoint() -> Any:
    """torch's functions that assemble sharded modules. Imported late: rollout workers do not need them."""
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _full_state_options(**options: bool) -> Any:
    return _checkpoint().StateDictOptions(full_state_dict=True, **options)
