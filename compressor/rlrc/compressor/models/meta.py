"""Modules without data: shapes on the meta device, and no initialiser runs.

PyTorch's initialisers on the meta device draw nothing, but they import ``torch._dynamo`` and run Python for every
parameter, which takes seconds for a policy of 7B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models import families
from rlrc.compressor.models.policy import PolicyModule

FILLS = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.fill_, torch.Tensor.zero_)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside have shapes but no data."""
    with torch.device("meta"), _SkipInitialisers():
        yield


def build_on_meta(spec: PolicySpec, towers: Mapping[str, TowerSpec]) -> PolicyModule:
    """The policy's module without data, in evaluation mode."""
    with on_meta():
        return families.build(spec, dict(towers)).eval()


class _SkipInitialisers(TorchFunctionMode):
    """Functions of torch.nn.init, and the in-place methods that they use, return the tensor as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
