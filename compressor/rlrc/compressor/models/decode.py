"""The decode drivers in torch: a batch of observations -> one chunk of normalised actions.

rlrc.runtime.inference.decode has the same three drivers for graphs. Gradients flow through all of them unless the
caller disables them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlrc.artifact import ActionSpec, PolicySpec
from rlrc.compressor.models.device import upload
from rlrc.compressor.models.policy import Inputs, Outputs
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import bin_centers


class EncodesPictures(Protocol):
    spec: PolicySpec

    def encode_image(self, pixels: Tensor) -> Tensor: ...


class Parallel(EncodesPictures, Protocol):
    def decode(self, image_tokens: Tensor, ids: Tensor | None, mask: Tensor | None, state: Tensor | None) -> Tensor:
        """Logits (B, horizon, dim, rows), or actions (B, horizon, dim) if the action has no bins."""
        ...


class Autoregressive(EncodesPictures, Protocol):
    def step(self, image_tokens: Tensor | None, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Logits (B, rows) of the last position, and the past for the next step.

        The sequence is the first id, the image tokens, and the other ids; with a past, the ids alone continue it.
        """
        ...

    def last_logits(self, image_tokens: Tensor, ids: Tensor, count: int) -> Tensor:
        """Logits (B, count, rows) of the last positions, from one pass over the prompt and the tokens after it."""
        ...


class Flow(EncodesPictures, Protocol):
    def prefix(
        self, image_tokens: Tensor, ids: Tensor | None, mask: Tensor | None, state: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """What the flow steps attend to, and a mask (B, L) that is false where it is padding."""
        ...

    def velocity(self, past: Any, mask: Tensor | None, state: Tensor | None, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of x (B, horizon, width) at the times t (B,), in the same shape."""
        ...


def encode_images(policy: EncodesPictures, inputs: Inputs) -> Tensor:
    """Image tokens (B, N, width) of all given cameras, one camera after the other."""
    return torch.cat([policy.encode_image(pixels) for pixels in inputs.pixels], 1)


def parallel(policy: Parallel, inputs: Inputs) -> Outputs:
    """The whole chunk in one pass (OpenVLA-OFT, arXiv 2502.19645, section 4)."""
    action = policy.spec.action
    decoded = policy.decode(encode_images(policy, inputs), inputs.ids, inputs.mask, inputs.state)
    return outputs_from_logits(decoded, action) if action.bins else Outputs(decoded.float())


def autoregressive(policy: Autoregressive, inputs: Inputs) -> Outputs:
    """horizon * dim tokens one after the other, each the likeliest (OpenVLA, arXiv 2406.09246).

    Only prompts of equal length are decoded together, so that no padding is needed.
    """

    def decode(image_tokens: Tensor, ids: Tensor, rows: Rows) -> Tensor:
        return _greedy(policy, image_tokens, ids)

    assert inputs.ids is not None
    logits = map_by_length(encode_images(policy, inputs), inputs.ids, inputs.mask, inputs.lengths, decode)
    return outputs_from_logits(logits, policy.spec.action)


def teacher_force(policy: Autoregressive, inputs: Inputs, tokens: Tensor) -> Tensor:
    """Logits (B, horizon, dim, rows), each conditioned on the given tokens (B, horizon, dim) that precede it."""
    given = tokens.flatten(1)

    def force(image_tokens: Tensor, ids: Tensor, rows: Rows) -> Tensor:
        sequence = torch.cat([ids, given[rows.index, :-1]], 1)
        return policy.last_logits(image_tokens, sequence, given.shape[1]).unflatten(1, tokens.shape[1:])

    assert inputs.ids is not None
    return map_by_length(encode_images(policy, inputs), inputs.ids, inputs.mask, inputs.lengths, force)


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch: their numbers, on the host, and what selects them on the device."""

    numbers: Sequence[int]
    index: Tensor | slice


def map_by_length(
    image_tokens: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lengths: tuple[int, ...] | None,
    one: Callable[[Tensor, Tensor, Rows], Tensor],
) -> Tensor:
    """Apply ``one(image_tokens, ids, rows)`` to the rows of each prompt length, and restore the order of the rows.

    ``lengths``: see Inputs. Without them the mask is read, for which the host waits.
    """
    every = Rows(range(len(ids)), slice(None))
    if mask is None:
        return one(image_tokens, ids, every)
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(mask.sum(1).tolist() if lengths is None else lengths):
        groups.setdefault(length, []).append(row)
    if len(groups) == 1:
        return one(image_tokens, ids[:, : next(iter(groups))], every)
    found = list[Tensor]()
    for length in sorted(groups):
        index = upload(torch.tensor(groups[length]), ids.device)
        found.append(one(image_tokens[index], ids[index, :length], Rows(groups[length], index)))
    order = torch.tensor([row for length in sorted(groups) for row in groups[length]]).argsort()
    return torch.cat(found)[upload(order, ids.device)]


def _greedy(policy: Autoregressive, image_tokens: Tensor, ids: Tensor) -> Tensor:
    """Logits (B, horizon, dim, rows)."""
    action, past, logits = policy.spec.action, None, list[Tensor]()
    for _ in range(action.horizon * action.dim):
        last, past = policy.step(None if logits else image_tokens, ids, past)
        ids = _offset(action) + last.argmax(-1, keepdim=True)
        logits.append(last)
    return torch.stack(logits, 1).unflatten(1, (action.horizon, action.dim))


def flow(policy: Flow, inputs: Inputs) -> Outputs:
    """Euler steps from noise at t = 1 to actions at t = 0 (pi0, arXiv 2410.24164, section IV).

    Step i is at the time 1 - i / steps; policies with tabulated norms compute i from it.
    """
    spec = policy.spec
    assert spec.flow is not None
    image_tokens = encode_images(policy, inputs)
    past, mask = policy.prefix(image_tokens, inputs.ids, inputs.mask, inputs.state)
    batch, steps = len(image_tokens), spec.flow.steps
    x = inputs.noise
    if x is None:
        x = upload(torch.randn(batch, spec.action.horizon, spec.flow.width), image_tokens.device)
    for i in range(steps):
        t = torch.full((batch,), 1 - i / steps, device=x.device)
        x = x - policy.velocity(past, mask, inputs.state, x, t) / steps
    return Outputs(x[..., : spec.action.dim].float())


def outputs_from_logits(logits: Tensor, action: ActionSpec) -> Outputs:
    """Logits (B, horizon, dim, rows) -> the likeliest token of each (the first, if equal) and its bin's centre.

    An action whose logits are not all finite is nan.
    """
    outputs = outputs_from_rows(logits.argmax(-1), action)
    actions = outputs.actions.masked_fill(~logits.isfinite().all(-1), float("nan"))
    return replace(outputs, actions=actions, logits=logits.float())


def check_finite_outputs(values: Tensor, name: str) -> None:
    """Raises UserError for nan or inf in a policy's output."""
    if not values.isfinite().all():
        raise UserError(f"expected finite {name} of the policy, found nan or inf; start from sound weights")


def outputs_from_rows(rows: Tensor, action: ActionSpec) -> Outputs:
    """Rows (B, horizon, dim) of the logits -> their tokens, and the centres of the tokens' bins."""
    tokens = _offset(action) + rows
    bins = tokens if action.tokens is None else (action.tokens.first - tokens).clamp(0, action.bins - 1)
    centers = upload(torch.from_numpy(bin_centers(action.bins)), bins.device)
    return Outputs(centers[bins], tokens)


def _offset(action: ActionSpec) -> int:
    return 0 if action.tokens is None else action.tokens.offset
