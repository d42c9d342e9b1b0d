"""Hidden-state distillation: a pruned policy learns from demonstrations and from its dense teacher's hidden states.

Pruning keeps the residual width, so what the student's blocks put out is regressed on what the teacher's do, with no
projector between (arXiv 2609.19579). The objective is ``task`` times the chunk's loss (rlrc.compressor.training.losses)
plus ``hidden`` times the squared error of the hidden states, relative to the teacher's, at every position of every
matched block alike: language models have positions whose states are hundreds of times larger than all others (arXiv
2402.17762), and a mean over raw squares would see only those. The teacher answers on the fly, or once for every sample:
its states are then read from the run's folder.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from rlrc.compressor.training.distributed import rank
from rlrc.compressor.training.losses import chunk_loss
from rlrc.compressor.training.sft import SFTConfig
from rlrc.errors import UserError
from rlrc.folders import translate_storage_errors

States = list[list[Tensor]]  # of every block what it put out (B, T, width), call by call


@dataclass(frozen=True)
class DistillConfig(SFTConfig):
    STAGE: ClassVar[str] = "distill"

    teacher: str = ""
    """the dense artifact or official folder to learn from; in a recipe, empty: what the recipe starts from"""
    hidden: float = 1.0
    """weight of the squared error of the hidden states, relative to the teacher's"""
    task: float = 1.0
    """weight of the chunk's loss"""
    cache: bool = False
    """keep the teacher's hidden states of every sample on disk, in the run's folder, instead of asking it again"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden > 0:
            raise UserError(f"expected distill.hidden > 0, found {self.hidden}; without it the stage is sft")
        if not self.task >= 0:
            raise UserError(f"expected distill.task >= 0, found {self.task}")
        for name in ("dagger_rounds", "state_noise"):
            if self.cache and getattr(self, name):
                raise UserError(
                    f"expected distill.{name} 0 with distill.cache, found {getattr(self, name)}; the teacher's hidden "
                    "states are kept for samples that stay as they are"
                )


def numbers(history: Sequence[HistoryEntry], tower: str, depth: int) -> list[int]:
    """The numbers that a tower's blocks had before whole ones were dropped."""
    dropped = [list[int](entry.after.get("removed", {}).get("dropped", {}).get(tower, ())) for entry in history]
    found = list(range(depth + sum(map(len, dropped))))
    for gone in dropped:
        found = [number for i, number in enumerate(found) if i not in gone]
    return found


@contextmanager
def recorded(policy: PolicyModule, blocks: Sequence[str]) -> Iterator[States]:
    """What the blocks of these names put out while the context lasts."""
    found: States = [[] for _ in blocks]

    def keep(states: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [
        policy.get_submodule(block).register_forward_hook(keep(states))
        for block, states in zip(blocks, found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def hidden_error(student: States, teacher: States) -> Tensor:
    """Mean over blocks and positions of |student - teacher|^2 / |teacher|^2."""
    errors = []
    for ours, its in zip(student, teacher, strict=True):
        pairs = [(a.float(), b.float()) for a, b in zip(ours, its, strict=True)]
        parts = [(a - b).square().sum(-1) / b.square().sum(-1).clamp(min=1e-12) for a, b in pairs]
        errors.append(torch.cat([part.flatten() for part in parts]).mean())
    return torch.stack(errors).mean()


class LiveTeacher:
    """The teacher, asked for every batch: frozen, without gradient, under the student's autocast."""

    def __init__(self, policy: PolicyModule, blocks: Sequence[str], smoothing: float) -> None:
        self.policy, self.blocks, self.smoothing = policy.eval().requires_grad_(False), blocks, smoothing

    def __call__(self, batch: Batch) -> States:
        """Of the blocks; the loss itself is not wanted, but it runs every tower on what the student's reads."""
        device = batch.actions.device
        self.policy.to(device)
        with torch.no_grad(), recorded(self.policy, self.blocks) as states, precision.autocast(device.type):
            chunk_loss(self.policy, batch, self.smoothing)
        return states


class CachedTeacher:
    """The teacher, asked once for every row of the training set: its states are kept in half precision on disk.

    In ``folder`` every block has a file (rows, T, width), filled as rows are drawn, by every process its own.
    """

    def __init__(self, teacher: LiveTeacher, folder: Path, rows: int) -> None:
        self.teacher, self.prefix, self.rows = teacher, f"{folder}/teacher-{rank()}", rows
        self.files: list[np.memmap] = []

    def __call__(self, batch: Batch) -> States:
        """Raises UserError for states that differ in length from row to row, or that half precision does not hold."""
        if batch.rows is None:  # not of the training set
            return self.teacher(batch)
        device, rows = batch.actions.device, batch.rows.cpu().numpy()
        if not self.files:
            self._open(batch.part(slice(0, 1)))
        done, *files = self.files
        if len(missing := np.flatnonzero(~done[rows])):
            states = self.teacher(batch.part(torch.from_numpy(missing).to(device)))
            for block, file, calls in zip(self.teacher.blocks, files, states, strict=True):
                file[rows[missing]] = _halved(block, file.shape[1], calls)
            done[rows[missing]] = True
        return [[torch.from_numpy(np.array(file[rows])).to(device)] for file in files]

    def _open(self, example: Batch) -> None:
        shapes = [(self.rows,), *((self.rows, *calls[0].shape[1:]) for calls in self.teacher(example))]
        names = [Path(f"{self.prefix}-{name}.npy") for name in ("rows", *self.teacher.blocks)]
        if names[0].exists():  # of the run that goes on
            self.files = [np.lib.format.open_memmap(name, "r+") for name in names]
            return
        size, free = 2 * sum(map(math.prod, shapes)), shutil.disk_usage(names[0].parent).free
        if size > free:
            raise UserError(
                f"expected {size / 1e9:.1f} GB free in {names[0].parent} for distill.cache, found {free / 1e9:.1f} GB; "
                "make room or leave the cache out"
            )
        kinds = [np.bool_, *[np.float16] * len(self.teacher.blocks)]
        made = zip(reversed(names), reversed(kinds), reversed(shapes), strict=True)  # the first one tells of the others
        with translate_storage_errors(names[0].parent):
            self.files = [_reserved(name, kind, shape) for name, kind, shape in made][::-1]


def _reserved(file: Path, kind: type, shape: tuple[int, ...]) -> np.memmap:
    """Zeros that have their room on the disk: a page of a sparse file that gets none would end the process."""
    array = np.lib.format.open_memmap(file, "w+", kind, shape)
    with file.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return array


def _halved(block: str, length: int, calls: list[Tensor]) -> np.ndarray:
    """What a block put out, as ``CachedTeacher`` stores it."""
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
    """See sft.Objective. The teacher is no module of it: nobody trains, wraps or saves it."""

    def __init__(
        self, policy: PolicyModule, blocks: Sequence[str], teacher: Callable[[Batch], States], config: DistillConfig
    ) -> None:
        super().__init__()
        self.policy, self.blocks, self.teacher, self.config = policy, blocks, teacher, config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> ``loss``, with gradient; and the hidden states' part of it, and the error of the actions."""
        wanted = self.teacher(batch)
        with precision.autocast(batch.actions.device.type), recorded(self.policy, self.blocks) as states:
            loss, error = chunk_loss(self.policy, batch, self.config.smoothing)
        hidden = hidden_error(states, wanted)
        return {"loss": self.config.task * loss + self.config.hidden * hidden, "hidden": hidden, "l1": error}


def distillation(
    config: DistillConfig, teacher: PolicyModule, pairs: Sequence[tuple[str, str]], batches: Batches, folder: Path
) -> Callable[[PolicyModule, float], nn.Module]:
    """What ``sft`` makes its objective with; ``pairs``: see ``matched``; a cache is kept in ``folder``.

    Raises UserError for a cache of a training set whose rows are not the same every time.
    """
    blocks, its = ([pair[i] for pair in pairs] for i in range(2))
    live = LiveTeacher(teacher, its, config.smoothing)
    ask: Callable[[Batch], States] = live
    if config.cache:
        before = batches.state()
        if batches.draw(1).rows is None:
            raise UserError(
                "expected samples that stay as they are for distill.cache, found data that is augmented; leave the "
                "cache out"
            )
        batches.restore(before)
        ask = CachedTeacher(live, folder, len(batches))
    return lambda policy, smoothing: Distillation(policy, blocks, ask, config)
