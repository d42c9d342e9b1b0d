"""Low-rank adapters (LoRA; Hu et al., 2021, arXiv 2106.09685) through peft."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlrc.compressor.models.nn.linear import Linear
from rlrc.compressor.models.policy import PolicyModule
from rlrc.errors import UserError

VISION = ("vision", "vision2")


def targets(policy: PolicyModule) -> list[str]:
    """Names of the linear layers of all towers except the vision transformers."""
    towers = tuple(f"{name}." for name in policy.towers if name not in VISION)
    return [
        name for name, module in policy.named_modules() if isinstance(module, nn.Linear) and name.startswith(towers)
    ]


def adapt(policy: PolicyModule, rank: int) -> None:
    """Freeze the policy and add an adapter of this rank to every target, in place. Initially they change nothing."""
    from peft import LoraConfig, inject_adapter_in_model

    if not (names := targets(policy)):
        raise UserError(f"expected linear layers to adapt in a policy of the family {policy.spec.family}, found none")
    policy.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    layers = [policy.get_submodule(name) for name in names]
    stored = [layer.get_parameter("weight").data for layer in layers]
    for layer, weight in zip(layers, stored, strict=True):
        # peft rounds adapters to the type of the weights: these have float32 meanwhile, without memory.
        layer.get_parameter("weight").data = torch.zeros((), device=weight.device).expand(weight.shape)
    inject_adapter_in_model(config, cast(Any, policy))
    for layer, weight in zip(layers, stored, strict=True):
        layer.get_parameter("weight").data = weight


def merge(policy: PolicyModule) -> None:
    """Add the adapters' products to the weights, and replace adapted layers by plain ones, in place.

    A sum is computed whenever the layer is used: the weights may be mapped, and have too few bits for it.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(policy.named_modules()):
        if isinstance(module, LoraLayer):
            layer, adapted = module.get_base_layer(), cast(Any, module)
            assert isinstance(layer, Linear)
            layer.source = partial(_add, layer.weight.detach(), adapted)
            layer.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"))
            parent, _, leaf = name.rpartition(".")
            setattr(policy.get_submodule(parent), leaf, layer)
    policy.requires_grad_(True)


def _add(weight: Tensor, adapted: Any, rows: slice | Tensor) -> Tensor:
    down, up = (cast(Tensor, layers["default"].weight.detach()) for layers in (adapted.lora_A, adapted.lora_B))
    return weight[rows].float() + float(adapted.scaling["default"]) * (up[rows] @ down)
