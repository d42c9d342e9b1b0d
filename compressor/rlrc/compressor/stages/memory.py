"""Predicts how much memory a stage needs, before it starts, instead of being killed in the middle.

Weights stay in their mapped files, in the type in which they are stored, and are widened one matrix at a time; on an
accelerator they are in its memory. What a pass takes besides is counted on the meta device (PeakMemory). The rest are
matrices: those that a stage computes with at one time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rlrc.compressor.models import device, heap
from rlrc.compressor.models.meta import build_on_meta, on_meta
from rlrc.compressor.models.nn import linear
from rlrc.compressor.models.nn.linear import Linear, Stored, receive_gradients, recompute, widen
from rlrc.compressor.models.peak import PeakMemory
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.prune.config import PruneConfig, tower_name
from rlrc.compressor.prune.importance import LARGE
from rlrc.compressor.quantize.calibration import ROWS
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantizable
from rlrc.compressor.stages.artifact_io import inputs_of
from rlrc.compressor.stages.sources import PolicySource, shapes
from rlrc.compressor.training import lora
from rlrc.compressor.training.batches import Batch
from rlrc.compressor.training.losses import chunk_loss, draw_noise
from rlrc.errors import UserError
from rlrc.tables import plain_console

if TYPE_CHECKING:
    from rlrc.compressor.training.config import SFTConfig  # imports rlrc.envs

SMALL = 100_000_000  # parameters: smaller policies need less than a gigabyte, and no prediction
DEQUANTIZED, ROUNDED = 9, 30  # bytes of a number besides its float32 value: while it is computed; while it is rounded
BASE = 240_000_000  # bytes of a process with torch and the libraries of a stage, where it cannot be measured
LATER = 90_000_000  # that other libraries, and the gaps in the heap, take later
FLOAT32, MOMENTS = 4, 8  # bytes of a number; of the two that AdamW keeps for it
META = torch.device("meta")

MEMINFO, STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes: ``held`` during the whole stage, ``passing`` at its worst moment; ``weights`` as they are stored."""

    weights: int
    held: int
    passing: int

    def in_memory(self) -> int:
        """Of a stage that computes on the CPU, besides what the process has now.

        Mapped weights are no part of it: the system can drop them.
        """
        return LATER + self.held + self.passing

    def on_accelerator(self) -> int:
        return self.weights + self.held + self.passing


def available() -> int | None:
    """Bytes that this process may still allocate, by the machine and its control group; None if unknown."""
    found = []
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            found.append(int(limit) - int(used) + int(cached.get("inactive_file", 0)))
    except OSError:
        pass
    return min(found) if found else None


def taken() -> int:
    """Bytes of memory that this process has now, without mapped files: libraries, tokenizers."""
    if not STATUS.exists():
        return BASE
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def count_numbers(tensors: Mapping[str, Tensor]) -> int:
    """Number of elements of a state dict, which may be on the meta device."""
    return sum(tensor.numel() for tensor in tensors.values())


def check(source: PolicySource, need: Callable[[], Need], work: str, advice: str = "close other programs") -> None:
    """Print what ``work`` needs, on stderr. Raises UserError, with the ``advice``, if that is more than is free.

    Small policies are not checked. For others the process returns freed memory to the system from now on.
    """
    if count_numbers(shapes(source)) < SMALL:
        return
    heap.return_large()
    needed, where = need(), device.current()
    name, size, free, has = "memory", needed.in_memory(), available(), taken()
    if where.type == "cuda":
        name, size, free, has = f"memory on {where}", needed.on_accelerator(), torch.cuda.mem_get_info(where)[0], 0
    if free is not None and size > free:
        raise UserError(
            f"expected {size / 1e9:.1f} GB of free {name} for {work}, found {free / 1e9:.1f} GB; {advice} or use a "
            "larger machine"
        )
    plain_console(stderr=True).print(f"{work} needs about {(has + size) / 1e9:.2f} GB of {name}")


def of_prune(source: PolicySource, config: PruneConfig) -> Need:
    policy = _as_stored(source)
    passing = [_infer(policy, source)]
    if not config.lossless:
        scored = _matrices(policy, f"{tower_name(source.towers, config)}.layers.")
        matrix = max((parameter.numel() for parameter in scored.values()), default=0)
        passing.append((2 + FLOAT32 + FLOAT32) * matrix)  # magnitudes, also in float32, and a product with them
        if config.score == "wanda":
            passing.append(_infer(policy, source, config.batch))
        elif config.score == "taylor":
            layers = {name: cast(Linear, policy.get_submodule(name.removesuffix(".weight"))) for name in scored}
            recomputes = sum(parameter.numel() for parameter in policy.parameters()) > LARGE
            with receive_gradients(layers, lambda name, gradient: gradient.mul_(1).abs_()):
                passing.append(_backward(policy, source, config.batch, {}, recomputes))
    return Need(_bytes(policy), 0, max(passing))


def of_quantize(source: PolicySource, config: QuantizeConfig) -> Need:
    policy = _as_stored(source)
    weights = [tensor for name, tensor in policy.state_dict().items() if quantizable(name, tensor)]
    matrix = max((tensor.numel() for tensor in weights), default=0)
    passing = [_infer(policy, source) + DEQUANTIZED * min(matrix, linear.PART), ROUNDED * min(matrix, linear.PART)]
    if config.method == "gptq":
        # The products of the inputs in float64, with these inputs, and then with the weight and its integers.
        for inputs, numel in {(tensor.shape[1], tensor.numel()) for tensor in weights}:
            passing.append(8 * inputs**2 + max(12 * ROWS * inputs, (2 * FLOAT32 + 1) * numel))
    elif config.method == "awq":
        passing.append(4 * FLOAT32 * matrix)
    return Need(_bytes(policy), 0, max(passing))


def of_training(source: PolicySource, config: SFTConfig, teacher: PolicySource | None = None) -> Need:
    policy, rows = _as_stored(source), config.batch // config.accumulate
    weights = _bytes(policy) if config.lora else 0  # all of them are trained: they are held in float32
    if config.lora:
        with on_meta():
            lora.adapt(policy, config.lora)
    else:
        widen(policy)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    held = count_numbers(trained) * (MOMENTS + (2 * FLOAT32 if config.held_out else FLOAT32))
    passing = _backward(policy, source, rows, trained, config.checkpointing)
    if teacher is not None:
        taught = _as_stored(teacher)
        weights, passing = weights + _bytes(taught), passing + _infer(taught, teacher, rows)
    return Need(weights, held, passing)


def of_reinforcement(source: PolicySource, minibatch: int) -> Need:
    policy = widen(_as_stored(source))
    trained = dict(policy.named_parameters())
    held = count_numbers(trained) * (FLOAT32 + MOMENTS)
    return Need(0, held, _backward(policy, source, minibatch, trained, recomputes=False))


def _as_stored(source: PolicySource) -> PolicyModule:
    """The policy without data, its matrices in bfloat16 as checkpoints and artifacts have them."""
    policy = build_on_meta(source.spec, source.towers)
    for module in policy.modules():
        if isinstance(module, Stored):
            weight = module.get_parameter("weight")
            weight.data = weight.data.bfloat16()
    return policy


def _matrices(policy: PolicyModule, prefix: str) -> dict[str, nn.Parameter]:
    layers = {f"{name}.weight": module for name, module in policy.named_modules() if isinstance(module, Linear)}
    return {name: layer.get_parameter("weight") for name, layer in layers.items() if name.startswith(prefix)}


def _bytes(policy: PolicyModule) -> int:
    return sum(tensor.nbytes for tensor in policy.state_dict().values())


def _batch(policy: PolicyModule, source: PolicySource, rows: int) -> Batch:
    """So many rows of the shapes of the source's first observation."""
    inputs, action = inputs_of(source.spec, source.observations(), 0), source.spec.action

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.new_empty(rows, *tensor.shape[1:], device=META)

    actions = torch.zeros(rows, action.horizon, action.dim)
    return draw_noise(policy, replace(Batch(inputs.each(repeat), actions))).to(META)


def _infer(policy: PolicyModule, source: PolicySource, rows: int = 1) -> int:
    with torch.no_grad(), PeakMemory(policy.state_dict().values()) as memory:
        policy.act(_batch(policy, source, rows).inputs)
    return int(memory.peak)


def _backward(
    policy: PolicyModule, source: PolicySource, rows: int, trained: Mapping[str, nn.Parameter], recomputes: bool
) -> int:
    policy.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    with PeakMemory(policy.state_dict().values()) as memory, recompute(policy, recomputes):
        chunk_loss(policy, _batch(policy, source, rows))[0].backward()
    return int(memory.peak)
