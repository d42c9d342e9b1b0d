"""The settings of ``rlrc sft``: what the user gives (SFTOptions), and what the stage computes with (SFTConfig)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from rlrc.compressor.training.losses import SMOOTHING
from rlrc.envs.seeds import DEMONSTRATION
from rlrc.errors import UserError
from rlrc.ranges import check_range

Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True)
class SFTOptions:
    """Settings of the stage. What is not given (None) depends on the policy: see docs/guide.md."""

    STAGE: ClassVar[str] = "sft"  # its name in errors and in the training curve

    steps: int | None = None
    """optimiser steps; None: as the policy's family is fine-tuned (docs/guide.md)"""
    batch: int | None = None
    """samples of a step (in each process, under accelerate launch); None: by family"""
    accumulate: int = 1
    """parts into which a process's batch is divided, to save memory"""
    rate: float | None = None
    """peak learning rate of AdamW; None: by family and by what is trained"""
    warmup: int | None = None
    """steps of linear warm-up; None: by family"""
    schedule: Schedule | None = None
    """how the rate falls to 2 %: linearly over the last ``decay`` of the steps, or as a cosine over all steps; None: by
    family"""
    decay: float | None = None
    """fraction of the steps, at the end, over which a linear schedule falls; None: by family"""
    weight_decay: float | None = None
    """weight decay of AdamW; None: by family"""
    lora: int | None = None
    """rank of LoRA adapters, which are trained instead of the weights and merged at the end; 0: train all weights;
    None: by family and size"""
    checkpointing: bool = False
    """compute every block again in the backward pass instead of keeping its values: less memory, a third more time"""
    smoothing: float = SMOOTHING
    """standard deviation, in bins, of the target distribution around the expert's action (logits over bins only)"""
    state_noise: float = 0.01
    """standard deviation of the noise on the normalised state"""
    held_out: float = 0.0
    """fraction of the demonstrations held out; the weights with the lowest held-out loss are kept"""
    check_every: int = 100
    """steps between two measurements of the held-out loss"""
    patience: int = 0
    """training stops after this many measurements without a lower held-out loss; 0: never"""
    data: str = ""
    """LeRobotDataset folder with the demonstrations; empty: the simulator's scripted experts (reference family)"""
    cameras: dict[str, str] = field(default_factory=dict)
    """pairs of a camera of the policy and one of the data set, if their names differ; none: leave the camera out"""
    statistics: Literal["policy", "data"] = "policy"
    """which statistics normalise: the policy's, completed by the data set's if some are missing; or the data set's for
    everything, as in LeRobot's training"""
    demonstrations: int = 60
    """expert episodes of each task"""
    first_seed: int = DEMONSTRATION.start
    """scene of the first demonstration"""
    dagger_rounds: int = 0
    """rounds of DAgger, spread evenly from dagger_start to dagger_end"""
    dagger_start: float = 0.1
    """fraction of the steps before the first round"""
    dagger_end: float = 0.85
    """fraction of the steps before the last round"""
    dagger_episodes: int = 208
    """episodes of a round, over all tasks; tasks that fail more get more"""
    seed: int = 0

    def __post_init__(self) -> None:
        check = partial(check_range, self, f"{self.STAGE}.")
        check("steps", "batch", "accumulate", "check_every", "demonstrations", "dagger_episodes", at_least=1)
        check("rate", "smoothing", above=0)
        check("warmup", "weight_decay", "lora", "state_noise", "patience", "dagger_rounds", "seed", at_least=0)
        check("decay", "dagger_start", "dagger_end", within=(0, 1))
        if not 0 <= self.held_out < 1:
            raise UserError(f"expected {self.STAGE}.held_out from 0 to below 1, found {self.held_out}")
        if self.schedule not in (None, "linear", "cosine"):
            raise UserError(f"expected {self.STAGE}.schedule linear or cosine, found {self.schedule!r}")
        if self.batch is not None and self.batch % self.accumulate:
            raise UserError(
                f"expected {self.STAGE}.accumulate to divide the batch of {self.batch}, found {self.accumulate}; "
                "change either"
            )
        if self.patience and not self.held_out:
            raise UserError(
                f"expected {self.STAGE}.held_out > 0 with {self.STAGE}.patience {self.patience}, found 0; "
                "hold episodes out"
            )
        self._check_scenes()

    def _check_scenes(self) -> None:
        last = self.first_seed + self.scenes() - 1
        if self.first_seed not in DEMONSTRATION or last not in DEMONSTRATION:
            raise UserError(
                f"expected {self.STAGE}.first_seed within {DEMONSTRATION.start} to "
                f"{DEMONSTRATION.stop - self.scenes()}, the scenes for demonstrations, found {self.first_seed}"
            )
        if self.dagger_start > self.dagger_end:
            raise UserError(
                f"expected {self.STAGE}.dagger_start <= {self.STAGE}.dagger_end, found {self.dagger_start} and "
                f"{self.dagger_end}"
            )
        if self.data and self.dagger_rounds:
            raise UserError(
                f"expected {self.STAGE}.dagger_rounds 0 with {self.STAGE}.data, found {self.dagger_rounds}; only the "
                "simulator has an expert to ask"
            )

    def less_memory(self) -> str:
        """What to change if memory is short."""
        changes = [] if self.lora else ["train adapters (--lora 16)"]
        changes += [] if self.checkpointing else ["give --checkpointing"]
        return ", ".join([*changes, "divide the batch (--accumulate)"])

    def scenes(self) -> int:
        """Simulated demonstrations of each task, including the held-out ones, which are additional."""
        return self.demonstrations + math.ceil(self.held_out * self.demonstrations)

    def completed(self, values: Mapping[str, Any]) -> SFTConfig:
        """The complete settings, with these values for fields that were not given. Raises UserError."""
        return SFTConfig(**given(self), **values)


def given(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not None."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class SFTConfig(SFTOptions):
    """Complete settings, as the history records them. The values here are those of the reference policy."""

    steps: int = 2000
    batch: int = 128
    rate: float = 8e-4
    warmup: int = 100
    schedule: Schedule = "linear"
    decay: float = 0.45
    weight_decay: float = 0.02
    lora: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (possible := len(self.rounds())) != self.dagger_rounds:
            raise UserError(
                f"expected {self.STAGE}.dagger_rounds to fall on different steps, found {self.dagger_rounds} rounds "
                f"on {possible} of {self.steps} steps; ask for fewer rounds or more steps"
            )

    def rounds(self) -> dict[int, int]:
        """Step -> number of the DAgger round played before it."""
        spread = np.linspace(self.dagger_start, self.dagger_end, self.dagger_rounds)
        return {min(int(part * self.steps), self.steps - 1): i for i, part in enumerate(spread)}

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "cosine":
            return self.rate * warm * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * warm * max(0.02, min(1.0, remaining))

    def ignorant_loss(self, chunk: float) -> float:
        """The objective of a policy that ignores what it sees, if the chunk's loss is this."""
        return chunk
