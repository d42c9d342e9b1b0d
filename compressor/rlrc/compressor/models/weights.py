"""Loads a policy's weights into its module, and checks, counts and narrows them.

Weights of linear layers and embeddings keep the type in which they are stored, and may be views of a mapped file (see
rlrc.compressor.models.nn.linear). All other tensors are small, and copied to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlrc.artifact import (
    ArtifactError,
    PolicySpec,
    TowerSpec,
)
from rlrc.compressor.models import heap
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.nn.linear import Rows, Stored
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage.tensors import Tensors, check_finite

KEPT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PolicyWeights:
    """A policy whose tensors are computed when they are read, so that a stage can write them one by one."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    tensors: Tensors

    @staticmethod
    def of(policy: PolicyModule | PolicyWeights) -> PolicyWeights:
        if isinstance(policy, PolicyWeights):
            return policy
        return PolicyWeights(policy.spec, policy.towers, tensors_of(policy))

    def count(self) -> int:
        """Number of parameters."""
        return sum(self.tensors.meta(name).numel() for name in self.tensors)

    def build(self) -> PolicyModule:
        """The policy with all its tensors."""
        return build_policy(self.spec, self.towers, self.tensors, self.tensors.origin)


def build_policy(
    spec: PolicySpec,
    towers: dict[str, TowerSpec],
    tensors: Mapping[str, Tensor],
    origin: str,
    advice: str = "make it again from sound weights",
) -> PolicyModule:
    """Build a policy with these weights, in evaluation mode.

    Raises ArtifactError for a tensor of another name or shape, and UserError with the ``advice`` for nan or inf.
    """
    policy = build_on_meta(spec, towers)
    load_tensors(policy, tensors, origin, advice)
    return policy.eval()


def load_tensors(
    policy: PolicyModule, tensors: Mapping[str, Tensor], origin: str, advice: str = "make it again from sound weights"
) -> None:
    """Load these weights into the policy. Raises as ``build_policy``."""
    stored = tensors if isinstance(tensors, Tensors) else Tensors(origin, dict(tensors))
    check_shapes(policy, {name: stored.shape(name) for name in stored}, origin)
    for name in stored:
        for part in stored.parts(name):
            check_finite(part.detach(), name, origin, advice)
        if name in stored.computed and set_source(policy, name, stored.shape(name), stored.computed[name]):
            continue
        set_tensor(policy, name, stored[name].detach())
    heap.trim()


def tensors_of(policy: PolicyModule) -> Tensors:
    """The policy's state dict. Weights that layers compute when they need them are computed when they are read."""
    state = policy.state_dict()
    sources = {f"{name}.weight": getattr(module, "source", None) for name, module in policy.named_modules()}
    computed = {name: source for name, source in sources.items() if source is not None}
    return Tensors("the policy", state, computed=computed)


def read_wide(policy: PolicyModule) -> dict[str, Tensor]:
    """The policy's state dict in float32, of weights that layers compute as well."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors_of(policy).items()
    }


def set_tensor(policy: nn.Module, name: str, tensor: Tensor) -> None:
    """Give the policy's parameter or buffer of this name these values."""
    module, leaf = _owner(policy, name)
    floats = tensor.is_floating_point()
    if isinstance(module, Stored) and leaf == "weight" and tensor.dtype in KEPT:
        module.source = None
    elif floats:
        tensor = tensor.to(torch.float32, copy=True)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=floats)
    else:
        module._buffers[leaf] = tensor


def set_source(policy: nn.Module, name: str, shape: tuple[int, ...], source: Rows) -> bool:
    """Let a layer compute its weight of this shape whenever it uses it; False if this one cannot."""
    module, leaf = _owner(policy, name)
    if not isinstance(module, Stored) or leaf != "weight":
        return False
    module.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    module.source = source
    return True


def _owner(policy: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return policy.get_submodule(owner), leaf


def check_shapes(policy: PolicyModule, found: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises ArtifactError unless these are the names and shapes of the policy's tensors."""
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ArtifactError(
                f"expected {expected.get(name, 'nothing')} for tensor {name} in {origin}, "
                f"found {found.get(name, 'nothing')}; make the artifact again"
            )


def count_parameters(policy: PolicyModule, prefix: str = "") -> int:
    """How many numbers are stored, in all or in one module ("decoder."), statistics of frozen norms included."""
    return sum(tensor.numel() for name, tensor in policy.state_dict().items() if name.startswith(prefix))


def narrow_dtype(tensor: Tensor, exact: bool) -> Tensor:
    """The tensor in bfloat16; with ``exact``, in float32 if bfloat16 would round it."""
    narrow = tensor.bfloat16()
    rounds = exact and tensor.dtype != torch.bfloat16 and not torch.equal(narrow.to(tensor.dtype), tensor)
    return tensor.float() if rounds else narrow


def narrow_tensors(tensors: Tensors, exact: bool) -> Tensors:
    """``narrow_dtype`` of every tensor, when it is read."""
    stored = dict[str, Tensor]()
    for name in tensors:
        known = tensors.dtype(name) == torch.bfloat16 or not exact
        dtype = torch.bfloat16 if known else narrow_dtype(tensors[name], exact).dtype
        stored[name] = tensors.meta(name).to(dtype)
    return Tensors(tensors.origin, stored, lambda name: tensors[name].to(stored[name].dtype))
