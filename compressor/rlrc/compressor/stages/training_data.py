"""Training data from a LeRobotDataset (``--data FOLDER``).

Without it, the reference family learns from the simulator's scripted experts; other families need a data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.compressor.models.tiny import FAMILY as REFERENCE
from rlrc.compressor.stages.sources import PolicySource
from rlrc.compressor.training.batches import Batch, TrainingData, collate
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import normalise, prepare
from rlrc.runtime.inference.prompts import Tokenizer

if TYPE_CHECKING:
    from rlrc.datasets.fit import MatchedDataset

MAX_HELD_OUT = 512  # frames, which stay in memory


class DatasetBatches:
    """Random batches of these frames of a data set (see Batches)."""

    def __init__(
        self, matched: MatchedDataset, frames: NDArray[np.int64], tokenizer: Tokenizer | None, seed: int
    ) -> None:
        self.matched, self.frames, self.tokenizer = matched, frames, tokenizer
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.frames)

    def draw(self, size: int) -> Batch:
        return self.rows(self.frames[self.rng.integers(0, len(self.frames), size)])

    def rows(self, frames: NDArray[np.int64]) -> Batch:
        """The batch of these frames."""
        spec, samples = self.matched.spec, self.matched.samples(frames)
        inputs = collate([prepare(sample.observation, spec, self.tokenizer) for sample in samples])
        actions = normalise(np.stack([sample.chunk for sample in samples]), spec.action.norm)
        return Batch(inputs, torch.from_numpy(actions), torch.from_numpy(np.stack([sample.real for sample in samples])))

    def state(self) -> Any:
        return self.rng.bit_generator.state

    def restore(self, state: Any) -> None:
        self.rng.bit_generator.state = state


class DataSettings(Protocol):
    """Which data set, and what is drawn from it."""

    @property
    def data(self) -> str: ...
    @property
    def cameras(self) -> Mapping[str, str]: ...
    @property
    def seed(self) -> int: ...


class TrainingSettings(DataSettings, Protocol):
    """Fields that the configurations of all training stages share: see SFTConfig."""

    @property
    def demonstrations(self) -> int: ...


def check_data(stage: str, source: PolicySource, config: TrainingSettings, instead: str = "") -> None:
    """Raises UserError without training data, or for a data set that does not fit the policy.

    ``instead`` continues the advice in the message.
    """
    if config.data:
        open_data(config, source.spec)
    elif source.spec.family != REFERENCE:
        raise UserError(
            f"expected demonstrations for {stage}, found none for a policy of the family {source.spec.family}; give "
            f"--data FOLDER, a LeRobotDataset{instead}"
        )


def open_data(config: DataSettings, spec: PolicySpec) -> MatchedDataset:
    """Raises UserError for a folder without a data set, or with one that does not fit the policy."""
    from rlrc.datasets.fit import match
    from rlrc.datasets.lerobot import Dataset

    return match(Dataset.open(Path(config.data)), spec, config.cameras)


def load_data(source: PolicySource, config: DataSettings, held_out: float = 0.0, size: int = 128) -> TrainingData:
    """``held_out``: fraction of the episodes that is held out, in batches of ``size`` frames."""
    from rlrc.datasets.fit import split

    matched = open_data(config, source.spec)
    training, held = split(matched.dataset, held_out, config.seed)
    batches = DatasetBatches(matched, training, source.tokenizer, config.seed)
    if len(held):
        held = held[np.linspace(0, len(held) - 1, min(len(held), MAX_HELD_OUT)).round().astype(int)]
    return TrainingData(batches, [batches.rows(held[i : i + size]) for i in range(0, len(held), size)])
