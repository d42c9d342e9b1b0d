"""The folders of OpenVLA in Hugging Face's format; OpenVLA-OFT uses the same format (oft.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlrc.artifact import PolicySpec
from rlrc.compressor.checkpoints.layout import Layout, TensorOrigin
from rlrc.compressor.checkpoints.prismatic import oft as prismatic_oft
from rlrc.compressor.checkpoints.prismatic import pictures
from rlrc.compressor.checkpoints.prismatic.layout import action_tokens, prismatic, prompt_spec
from rlrc.compressor.checkpoints.prismatic.norm_stats import action_spec, describe_statistics, normalisation, statistics

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.models.openvla import FAMILY


def recognise(folder: Folder) -> bool:
    return folder.config.get("model_type") == "openvla"


def layout(folder: Folder, options: ReadOptions) -> Layout:
    """The layout. Raises UserError for unsupported folders, and for facts that neither folder nor options state."""
    shared = prismatic(folder, options)
    is_oft, assumed = prismatic_oft.recognise(folder, options)
    if is_oft:
        return prismatic_oft.layout(folder, options, shared)
    key, stats = statistics(folder, options)
    action = action_spec(1, normalisation(stats, "action", "bounds_q99"), *action_tokens(folder))
    normalised = {"action": describe_statistics(folder, key, "action", "bounds_q99")}
    normalised |= pictures.describe_pictures(folder, [shared.camera])
    prompt, guessed = prompt_spec(folder, options, shared.tokens + action.dim)
    spec = PolicySpec(FAMILY, "autoregressive", (shared.camera,), None, prompt, action, shared.geometry)
    parts = {**shared.origins, "head.weight": TensorOrigin((shared.head,))}
    return Layout(spec, shared.towers, parts, tuple(shared.unused), assumed + guessed, normalised)
