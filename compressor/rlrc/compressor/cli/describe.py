"""Describes a checkpoint folder on one screen and as JSON. Reads shapes, never weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from torch import Tensor

from rlrc.artifact.describe import describe_prunable as prunable_parts
from rlrc.artifact.describe import normalisation_lines, policy_rows
from rlrc.compressor.checkpoints import reader
from rlrc.compressor.checkpoints.folder import Folder
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.models.coupling import TOWERS, find_groups
from rlrc.compressor.models.policy import PolicyModule
from rlrc.runtime.cli.describe import modules_table
from rlrc.strict import encode
from rlrc.tables import print_rows, print_table

# Prefixes of the tensors in well-known components; all others are "other".
COMPONENTS = {
    "featurizer": "vision_backbone.featurizer.",
    "fused_featurizer": "vision_backbone.fused_featurizer.",
    "projector": "projector.",
    "language_model": "language_model.",
    "vision_tower": "model.paligemma_with_expert.paligemma.model.vision_tower.",
    "multi_modal_projector": "model.paligemma_with_expert.paligemma.model.multi_modal_projector.",
    "paligemma": "model.paligemma_with_expert.paligemma.",
    "gemma_expert": "model.paligemma_with_expert.gemma_expert.",
    "vision_model": "model.vlm_with_expert.vlm.model.vision_model.",
    "connector": "model.vlm_with_expert.vlm.model.connector.",
    "text_model": "model.vlm_with_expert.vlm.",
    "lm_expert": "model.vlm_with_expert.lm_expert.",
    "backbone": "model.backbone.",
    "encoder": "model.encoder.",
    "decoder": "model.decoder.",
    "vae_encoder": "model.vae_encoder",
}


def describe_checkpoint(folder: Folder, layout: Layout, policy: PolicyModule, data_sets: list[str]) -> dict[str, Any]:
    """The description as JSON values. ``policy`` is on the meta device."""
    stored, components, dead = list[Tensor](), dict[str, list[Tensor]](), list[Tensor]()
    unused = set(layout.unused)
    for file, tensors in reader.sources(folder, layout).items():
        for name in tensors:
            tensor = tensors.meta(name)
            stored.append(tensor)
            components.setdefault(file.split("--")[0] or component(name), []).append(tensor)
            if name in unused:
                dead.append(tensor)
    state = policy.state_dict()
    modules: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        modules.setdefault(name.split(".")[0], []).append(tensor)
    return {
        "path": str(folder.path),
        "family": layout.spec.family,
        **count(stored),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored}),
        "components": {name: count(tensors) for name, tensors in components.items()},
        "unused": count(dead),
        "modules": {name: sum(tensor.numel() for tensor in tensors) for name, tensors in modules.items()},
        "prunable": prunable(layout, policy),
        "data_sets": data_sets,
        "assumed": list(layout.assumed),
        "normalisation": encode(layout.normalisation),
        "policy": encode(layout.spec),
        "towers": encode(layout.towers),
    }


def component(name: str) -> str:
    fitting = [(len(prefix), short) for short, prefix in COMPONENTS.items() if name.startswith(prefix)]
    return max(fitting)[1] if fitting else "other"


def count(tensors: Iterable[Tensor]) -> dict[str, int]:
    tensors = list(tensors)
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "tensors": len(tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def prunable(layout: Layout, policy: PolicyModule) -> dict[str, int]:
    """Parameters of the heads and MLP channels of every tower's blocks but the first and the last."""
    state, sums = policy.state_dict(), dict[str, int]()
    for tower in (tower for tower in TOWERS if tower in layout.towers):
        layers = layout.towers[tower].layers
        sums[tower] = sum(
            state[f"{name}.weight"].numel()
            for i in range(1, len(layers) - 1)
            for group in find_groups(layout.towers, tower, i, state)
            if group.number
            for name in group.layers
        )
    return sums


def print_checkpoint(facts: dict[str, Any], layout: Layout, console: Console) -> None:
    parts = "; ".join(
        f"{name} {format_count(part['parameters'])} in {part['tensors']}" for name, part in facts["components"].items()
    )
    unused = facts["unused"]
    rows = {
        "checkpoint": facts["path"],
        **policy_rows(layout.spec),
        "normalisation": "\n".join(normalisation_lines(facts["normalisation"])),
        "parameters": f"{facts['parameters']:,} in {facts['tensors']} tensors: {parts}",
        "bytes": f"{facts['bytes']:,} as {', '.join(facts['dtypes'])}",
        "data sets": ", ".join(facts["data_sets"]),
        "never read": f"{format_count(unused['parameters'])} parameters in {unused['tensors']} tensors: "
        "no action depends on them",
        "can be pruned": prunable_parts(layout.towers),
        "assumed": "; ".join(facts["assumed"]),
    }
    print_rows({name: value for name, value in rows.items() if value}, console)
    print_table(modules_table(facts["modules"], layout.towers), console)


def format_count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e5 else f"{parameters / 1e3:.1f}k"
