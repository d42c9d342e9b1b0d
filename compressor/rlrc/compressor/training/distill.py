"""Hidden-state distillation: a pruned policy learns from demonstrations and from its dense teacher's hidden states.

Pruning keeps the residual width, so the outputs of the student's blocks are regressed on those of the teacher's blocks
without a projector (arXiv 2609.19579). The objective is ``task`` times the chunk's loss
(rlrc.compressor.training.losses) plus ``hidden`` times the squared error of the hidden states. The error is relative to
the teacher's squared norm at each position of each matched block, because language models have positions whose states
are hundreds of times larger than all others (arXiv 2402.17762), which would dominate a mean over absolute squares. The
teacher runs on every batch, or once for every sample, with its states cached in the run's folder.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rlrc.artifact import HistoryEntry
from rlrc.compressor.models import precision
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.training.batches import Batch, Batches
from rlrc.compressor.training.config import SFTConfig, SFTOptions, given
from rlrc.compressor.training.distributed import rank
from rlrc.compressor.training.losses import chunk_loss
from rlrc.errors import UserError
from rlrc.folders import translate_storage_errors
from rlrc.ranges import check_range

HiddenStates = list[list[Tensor]]  # for each block, its output (B, T, width) in each call


@dataclass(frozen=True)
class DistillOptions(SFTOptions):
    STAGE: ClassVar[str] = "distill"

    teacher: str = ""
    """dense artifact or official checkpoint folder to learn from; empty in a recipe: the source of the recipe"""
    hidden: float = 1.0
    """weight of the relative squared error of the hidden states"""
    task: float = 1.0
    """weight of the loss on demonstrations"""
    cache: bool = False
    """store the teacher's hidden states of every sample on disk, in the run's folder, instead of recomputing them"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden > 0:
            raise UserError(f"expected distill.hidden > 0, found {self.hidden}; without it the stage is sft")
        check_range(self, "distill.", "task", at_least=0)
        for name in ("dagger_rounds", "state_noise"):
            if self.cache and getattr(self, name):
                raise UserError(
                    f"expected distill.{name} 0 with distill.cache, found {getattr(self, name)}; the "
                    "teacher's hidden states are cached only for samples that never change"
                )

    def completed(self, values: Mapping[str, Any]) -> DistillConfig:
        return DistillConfig(**given(self), **values)


@dataclass(frozen=True)
class DistillConfig(SFTConfig, DistillOptions):
    """Complete settings: see SFTConfig."""

    def ignorant_loss(self, chunk: float) -> float:
        """Hidden states of zero have a relative error of 1."""
        return self.task * chunk + self.hidden


def original_numbers(history: Sequence[HistoryEntry], tower: str, depth: int) -> list[int]:
    """The numbers of a tower's blocks before whole blocks were dropped, from the history's prune stages."""
    dropped = [list[int](entry.after.get("removed", {}).get("dropped", {}).get(tower, ())) for entry in history]
    numbers = list(range(depth + sum(map(len, dropped))))
    for indices in dropped:
        numbers = [number for i, number in enumerate(numbers) if i not in indices]
    return numbers


@contextmanager
def record_outputs(policy: PolicyModule, blocks: Sequence[str]) -> Iterator[HiddenStates]:
    """Collect the outputs of these blocks within the context."""
    collected: HiddenStates = [[] for _ in blocks]

    def keep(states: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [
        policy.get_submodule(block).register_forward_hook(keep(states))
        for block, states in zip(blocks, collected, strict=True)
    ]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def hidden_error(student: HiddenStates, teacher: HiddenStates) -> Tensor:
    """Mean over blocks and positions of |student - teacher|^2 / |teacher|^2."""
    errors = []
    for student_calls, teacher_calls in zip(student, teacher, strict=True):
        pairs = [(s.float(), t.float()) for s, t in zip(student_calls, teacher_calls, strict=True)]
        parts = [(s - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-12) for s, t in pairs]
        errors.append(torch.cat([part.flatten() for part in parts]).mean())
    return torch.stack(errors).mean()


class LiveTeacher:
    """Runs the frozen teacher on every batch, without gradient, under the student's autocast."""

    def __init__(self, policy: PolicyModule, blocks: Sequence[str], smoothing: float) -> None:
        self.policy, self.blocks, self.smoothing = policy.eval().requires_grad_(False), blocks, smoothing

    def __call__(self, batch: Batch) -> HiddenStates:
        """Hidden states of the blocks. Computing the loss runs every tower on the student's inputs; it is discarded."""
        device = batch.actions.device
        self.policy.to(device)
        with torch.no_grad(), record_outputs(self.policy, self.blocks) as states, precision.autocast(device.type):
            chunk_loss(self.policy, batch, self.smoothing)
        return states


class CachedTeacher:
    """Runs the teacher once for every row of the training set, and stores its states on disk in half precision.

    Each process has one file (rows, T, width) for each block in ``folder``, filled as rows are drawn.
    """

    def __init__(self, teacher: LiveTeacher, folder: Path, rows: int) -> None:
        self.teacher, self.prefix, self.rows = teacher, f"{folder}/teacher-{rank()}", rows
        self.files: list[np.memmap] = []

    def __call__(self, batch: Batch) -> HiddenStates:
        """Raises UserError if prompts differ in length, or if states exceed the range of half precision."""
        if batch.rows is None:  # a held-out batch
            return self.teacher(batch)
        device, rows = batch.actions.device, batch.rows.numpy()
        if not self.files:
            self._open(batch.part(slice(0, 1)))
        done, *files = self.files
        if len(missing := np.flatnonzero(~done[rows])):
            states = self.teacher(batch.part(torch.from_numpy(missing)))
            for block, file, calls in zip(self.teacher.blocks, files, states, strict=True):
                file[rows[missing]] = _to_half(block, file.shape[1], calls)
            done[rows[missing]] = True
        return [[torch.from_numpy(np.array(file[rows])).to(device)] for file in files]

    def _open(self, example: Batch) -> None:
        shapes = [(self.rows,), *((self.rows, *calls[0].shape[1:]) for calls in self.teacher(example))]
        names = [Path(f"{self.prefix}-{name}.npy") for name in ("rows", *self.teacher.blocks)]
        if names[0].exists():  # of a resumed run
            self.files = [np.lib.format.open_memmap(name, "r+") for name in names]
            return
        size, free = 2 * sum(map(math.prod, shapes)), shutil.disk_usage(names[0].parent).free
        if size > free:
            raise UserError(
                f"expected {size / 1e9:.1f} GB free in {names[0].parent} for distill.cache, found {free / 1e9:.1f} GB; "
                "free some space or leave the cache out"
            )
        kinds = [np.bool_, *[np.float16] * len(self.teacher.blocks)]
        files = list(zip(names, kinds, shapes, strict=True))
        with translate_storage_errors(
            names[0].parent
        ):  # the first file last: its existence shows that all others are complete
            self.files = [_allocate_file(*file) for file in reversed(files)][::-1]


def _allocate_file(file: Path, kind: type, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros with allocated blocks: writing to a sparse file on a full disk would kill the process."""
    array = np.lib.format.open_memmap(file, "w+", kind, shape)
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return array


def _to_half(block: str, length: int, calls: list[Tensor]) -> np.ndarray:
    """A block's output as ``CachedTeacher`` stores it."""
    if [values.shape[1] for values in calls] != [length]:
        raise UserError(
            f"expected hidden states of {length} positions in {block} for distill.cache, found "
            f"{', '.join(str(values.shape[1]) for values in calls)}: prompts have several lengths; leave the cache out"
        )
    halved = calls[0].half()
    if not halved.isfinite().all():
        raise UserError(
            f"expected hidden states below 65504 for distill.cache, found larger ones in {block}; leave the cache out"
        )
    return halved.cpu().numpy()


class Distillation(nn.Module):
    """The objective: see SFTObjective. The teacher is not a submodule, so it is not trained, wrapped or saved."""

    def __init__(
        self,
        policy: PolicyModule,
        blocks: Sequence[str],
        teacher: Callable[[Batch], HiddenStates],
        config: DistillConfig,
    ) -> None:
        super().__init__()
        self.policy, self.blocks, self.teacher, self.config = policy, blocks, teacher, config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> ``loss``, with gradient, the hidden states' error, and the error of the actions."""
        target = self.teacher(batch)
        with precision.autocast(batch.actions.device.type), record_outputs(self.policy, self.blocks) as states:
            loss, error = chunk_loss(self.policy, batch, self.config.smoothing)
        hidden = hidden_error(states, target)
        return {"loss": self.config.task * loss + self.config.hidden * hidden, "hidden": hidden, "l1": error}


def build_objective(
    config: DistillConfig, teacher: PolicyModule, pairs: Sequence[tuple[str, str]], batches: Batches, folder: Path
) -> Callable[[PolicyModule, float], nn.Module]:
    """-> the ``objective`` argument of ``sft``.

    ``pairs``: names of the student's and the teacher's blocks; ``folder``: where a cache is stored. Raises UserError
    for a cache with a training set that augments its samples.
    """
    student_blocks, teacher_blocks = ([pair[i] for pair in pairs] for i in range(2))
    live = LiveTeacher(teacher, teacher_blocks, config.smoothing)
    states_of: Callable[[Batch], HiddenStates] = live
    if config.cache:
        before = batches.state()
        if batches.draw(1).rows is None:
            raise UserError(
                "expected samples that never change for distill.cache, found augmented data; leave the cache out"
            )
        batches.restore(before)
        states_of = CachedTeacher(live, folder, len(batches))
    return lambda policy, smoothing: Distillation(policy, student_blocks, states_of, config)
