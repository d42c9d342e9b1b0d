"""One file per group of families: how to recognise an official folder, its layout, and the policy's module.

Each has ``build(spec, towers) -> Policy``, and those of official formats ``recognise(folder) -> bool`` and
``layout(folder, options) -> Layout``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.policy import Policy
from rlrc.errors import UserError

# Which file knows a family.
FAMILIES = {
    "tiny": "tiny",
    "openvla": "openvla",
    "openvla-oft": "openvla",
    "pi0": "flow",
    "pi05": "flow",
    "smolvla": "flow",
    "act": "act",
}


# By type or model_type of config.json: a part of a family's names of tensors, and the prefix of that part.
NAMES = {
    "openvla": ("language_model.", ""),
    "pi0": ("paligemma_with_expert.", "model."),
    "pi05": ("paligemma_with_expert.", "model."),
    "smolvla": ("vlm_with_expert.", "model."),
    "act": ("action_head.", "model."),
}


def backbone(family: str) -> ModuleType:
    """The module of a family, imported now. Raises UserError for an unknown one."""
    if family not in FAMILIES:
        raise UserError(f"expected one of the families {', '.join(FAMILIES)}, found {family!r}; upgrade rlrc")
    return import_module(f"{__name__}.{FAMILIES[family]}")


def build(spec: PolicySpec, towers: dict[str, TowerSpec]) -> Policy:
    """The policy that a manifest describes, its weights without meaning. Raises UserError for an unknown family."""
    policy: Policy = backbone(spec.family).build(spec, towers)
    return policy
