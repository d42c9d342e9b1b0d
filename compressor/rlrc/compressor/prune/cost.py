"""The cost of a shape, without weights: bytes of the stored weights, and the time of a decision.

The time is a model, meaningful relative to another shape of the same policy on the same computer. A product of inputs
(T, k) with weights (k, n) counts max(T, BALANCE) * (k n + ELEMENT (k + n)): below BALANCE rows its time is that of
reading the weights, and every input and output counts as ELEMENT multiply-adds, which covers norms, activations and
sums. Products of activations (attention) count their multiply-adds. One decision is the vision of every picture, then
one parallel pass, or a prompt and all its tokens one after the other, or a prefix and all its flow steps. See
docs/decisions for measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlrc.compressor.models import decode
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.quantize.grid import count_bytes
from rlrc.compressor.quantize.quantize import quantizable

BALANCE = 20  # rows
ELEMENT = 30  # multiply-adds
PROMPT = 32  # tokens of an unpadded prompt

aten = torch.ops.aten


def weight_bytes(policy: PolicyModule, precision: str = "int4") -> int:
    """Bytes of the weights as ``rlrc quantize`` stores them ("int4"), or in 16 bits ("bf16"), without file headers."""
    size = 0
    for name, tensor in policy.state_dict().items():
        packed = precision == "int4" and quantizable(name, tensor)
        size += count_bytes(tensor.numel(), 4) if packed else tensor.numel() * 2
    return size


class OperationCounter(TorchDispatchMode):
    """Adds up the cost of all operations within the context; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.total, self.times = 0.0, 1

    @contextmanager
    def repeat(self, times: int) -> Iterator[None]:
        """Count the operations within this context ``times`` times."""
        self.times *= times
        yield
        self.times //= times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.addmm.default):
            (rows, inputs), outputs = args[-2].shape, args[-1].shape[1]
            self.total += self.times * self.product(rows, inputs, outputs)
        elif func is aten.bmm.default:
            self.total += self.times * prod(args[0].shape) * args[1].shape[2]
        elif func is aten.convolution.default:
            batch, outputs, *size = out.shape
            self.total += self.times * self.product(batch * prod(size), prod(args[1].shape[1:]), outputs)
        return out

    @staticmethod
    def product(rows: int, inputs: int, outputs: int) -> float:
        return max(rows, BALANCE) * (inputs * outputs + ELEMENT * (inputs + outputs))


def decision_cost(policy: PolicyModule) -> float:
    """The cost of one chunk of actions in multiply-adds, of a policy made by ``build_on_meta``."""
    spec = policy.spec
    with torch.no_grad(), torch.device("meta"), OperationCounter() as work:
        encoded = []
        for camera in spec.cameras:
            height, width, channels = camera.height, camera.width, len(camera.mean)
            shape = (height, width, channels) if camera.layout == "HWC" else (channels, height, width)
            encoded.append(policy.encode_image(torch.empty(1, *shape)))
        image_tokens, ids, state = torch.cat(encoded, 1), None, None
        if spec.prompt is not None:
            most = spec.prompt.max_tokens
            ids = torch.empty(1, min(most, PROMPT) if spec.prompt.pad_id is None else most, dtype=torch.long)
        if spec.state is not None:
            state = torch.empty(1, spec.state.width or len(spec.state.names))
        _DRIVERS[spec.decode](policy, work, image_tokens, ids, state)
    return float(work.total)


def _parallel(
    policy: Any, work: OperationCounter, image_tokens: Tensor, ids: Tensor | None, state: Tensor | None
) -> None:
    cast(decode.Parallel, policy).decode(image_tokens, ids, None, state)


def _autoregressive(
    policy: Any, work: OperationCounter, image_tokens: Tensor, ids: Tensor | None, state: Tensor | None
) -> None:
    assert ids is not None
    action = policy.spec.action
    _, past = policy.step(image_tokens, ids, None)
    with work.repeat(action.horizon * action.dim - 1):
        policy.step(None, ids[:, :1], past)


def _flow(policy: Any, work: OperationCounter, image_tokens: Tensor, ids: Tensor | None, state: Tensor | None) -> None:
    flow = policy.spec.flow
    past, mask = policy.prefix(image_tokens, ids, None, state)
    x = torch.empty(1, policy.spec.action.horizon, flow.width)
    with work.repeat(flow.steps):
        policy.velocity(past, mask, state, x, torch.ones(1))


_DRIVERS = {"parallel": _parallel, "autoregressive": _autoregressive, "flow": _flow}
