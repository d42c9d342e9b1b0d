"""Folders of LeRobot before 0.4, with statistics as buffers among the weights and modes in config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from rlrc.compressor.checkpoints.lerobot.normaliser import Statistics, check_mode
from rlrc.compressor.checkpoints.lerobot.steps import Effect, NormalizerStep

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder

# Statistics among the weights: normalize_inputs.so100_buffer_observation_state.mean of lerobot before 0.4,
# and so100.buffer.action.mean of those that lerobot migrated.
BUFFER = re.compile(
    r"(?:(normalize_inputs|normalize_targets|unnormalize_outputs)\.)?((?:.*[._])?buffer[._].+)\.(mean|std|min|max|q\d\d)"
)


def read_buffers(folder: Folder) -> tuple[Statistics, Statistics]:
    """The statistics of the inputs and of the action. Skips buffers of infinity, which were never set."""
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name in folder.tensors:
        if (match := BUFFER.fullmatch(name)) and not torch.isinf(tensor := folder.tensors.read(name)).all():
            found.setdefault(match[1] or "", {}).setdefault(match[2], {})[match[3]] = tensor
    migrated = found.get("", {})
    inwards = migrated | found.get("normalize_inputs", {})
    outwards = migrated | found.get("normalize_targets", {}) | found.get("unnormalize_outputs", {})
    return Statistics("the weights", inwards), Statistics("the weights", outwards)


def read_modes(config: Mapping[str, Any], kinds: Mapping[str, str], statistics: Statistics) -> list[Effect]:
    """The normalising step of a folder without pipelines, for inputs of these kinds and the action.

    LeRobot before 0.4 also added eps to every input range, which float32 rounds away.
    """
    modes, where = config.get("normalization_mapping"), "normalization_mapping of config.json"
    modes = modes if isinstance(modes, dict) else {}
    for kind, mode in modes.items():
        check_mode(kind, mode, where)
    return [NormalizerStep(where, where, modes, kinds, statistics, 1e-8)]
