"""An accelerator in name only: whatever would fail or wait on a GPU fails here, without one.

Weights and batches are fake tensors on torch's device "meta", which takes the accelerator's place; they have shapes and
no data. An operation that mixes in a tensor left on the CPU raises FakeTensorDeviceMismatchError, also the two that
torch's fake tensors let pass: lookups and indices. An operation whose result the host must read (``item``, ``unique``,
``nonzero``) raises too. Copies for which the host would wait are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """``waits``: the copies between host and accelerator so far that wait for all work before them.

    Those to the accelerator do unless they are made by ``device.upload``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        devices = {tensor.device.type for tensor in given if tensor.ndim}  # numbers may come from the host
        if func not in COPIES and len(devices) > 1:
            raise FakeTensorDeviceMismatchError(func, *map(torch.device, sorted(devices)))
        result = func(*args, **(kwargs or {}))
        if func in COPIES and not (kwargs or {}).get("non_blocking"):
            self.waits += {tensor.device.type for tensor in (*given, result)} == {"cpu", DEVICE.type}
        return result


@contextmanager
def fake_device() -> Iterator[OneDevice]:
    """Tensors made within the context are fake; ``to(DEVICE)`` moves real ones to the accelerator."""
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice() as mode:
        yield mode


def on_device(spec: PolicySpec, towers: dict[str, TowerSpec]) -> PolicyModule:
    """The policy with its weights on the accelerator; call it within ``fake_device``."""
    return build_on_meta(spec, towers)
