"""Loads a policy's weights into its module, and checks and counts them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlrc.artifact import (
    ArtifactError,
    PolicySpec,
    TowerSpec,
)
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.tensors import check_finite


def build_policy(
    spec: PolicySpec,
    towers: dict[str, TowerSpec],
    tensors: Mapping[str, Tensor],
    origin: str,
    advice: str = "make it again from sound weights",
) -> PolicyModule:
    """Build a policy with these weights in float32, in evaluation mode.

    Raises ArtifactError for a tensor of another name or shape, and UserError with the ``advice`` for nan or inf.
    """
    policy = build_on_meta(spec, towers)
    load_tensors(policy, tensors, origin, advice)
    return policy.eval()


def load_tensors(
    policy: PolicyModule, tensors: Mapping[str, Tensor], origin: str, advice: str = "make it again from sound weights"
) -> None:
    """Load these weights into the policy, in float32. Raises as ``build_policy``."""
    check_shapes(policy, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, origin)
    for name, tensor in tensors.items():
        check_finite(tensor, name, origin, advice)
    policy.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


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
    """The tensor in bfloat16; with ``exact``, unchanged if bfloat16 would round it."""
    narrow = tensor.bfloat16()
    return tensor if exact and not torch.equal(narrow.to(tensor.dtype), tensor) else narrow
