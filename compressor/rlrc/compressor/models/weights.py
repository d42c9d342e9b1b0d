"""A policy's weights: given to its module, checked, counted."""

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


def policy_of(
    spec: PolicySpec,
    towers: dict[str, TowerSpec],
    tensors: Mapping[str, Tensor],
    origin: str,
    advice: str = "make it again from sound weights",
) -> PolicyModule:
    """A policy with these weights in float32, in evaluation mode.

    Raises ArtifactError for a tensor that does not fit, and UserError with the ``advice`` for nan or inf in one.
    """
    policy = build_on_meta(spec, towers)
    load_tensors(policy, tensors, origin, advice)
    return policy.eval()


def load_tensors(
    policy: PolicyModule, tensors: Mapping[str, Tensor], origin: str, advice: str = "make it again from sound weights"
) -> None:
    """Gives the policy these weights, in float32. Raises as ``policy_of``."""
    check_shapes(policy, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, origin)
    for name, tensor in tensors.items():
        check_finite(tensor, name, origin, advice)
    policy.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


def check_shapes(policy: PolicyModule, found: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises ArtifactError unless these are the policy's tensors."""
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ArtifactError(
                f"expected {expected.get(name, 'nothing')} for tensor {name} in {origin}, "
                f"found {found.get(name, 'nothing')}; make the artifact again"
            )


def parameters(policy: PolicyModule, prefix: str = "") -> int:
    """How many numbers are stored, in all or of one module ("decoder."): statistics of frozen norms count too."""
    return sum(tensor.numel() for name, tensor in policy.state_dict().items() if name.startswith(prefix))


def narrowed(tensor: Tensor, exact: bool) -> Tensor:
    narrow = tensor.bfloat16()
    return tensor if exact and not torch.equal(narrow.to(tensor.dtype), tensor) else narrow
