"""The loss of a chunk, by the policy's kind of output: the objectives of the official checkpoints.

- Logits over bins (the reference family): cross-entropy to a Gaussian around the expert's action.
- Tokens of a vocabulary (OpenVLA, arXiv 2406.09246; discrete OpenVLA-OFT): cross-entropy; autoregressive policies are
  teacher-forced with the expert's tokens.
- Numbers (OpenVLA-OFT, arXiv 2502.19645; ACT, 2304.13705): L1. ACT's latent is zero, as in inference, because its
  variational encoder is not part of the policy.
- Flow matching (pi0, arXiv 2410.24164, section IV; pi0.5; SmolVLA): squared error of the velocity at a random time.

Steps after an episode's end do not count. All losses are differentiable means over the batch's real numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrc.artifact import ActionSpec
from rlrc.compressor.models import decode
from rlrc.compressor.models.device import upload, widest_float
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.training.batches import Batch
from rlrc.runtime.inference.preprocess import bin_centers

SMOOTHING = 2.0  # bins


def chunk_loss(policy: PolicyModule, batch: Batch, smoothing: float = SMOOTHING) -> tuple[Tensor, Tensor]:
    """-> the loss, and the mean absolute error of normalised actions (without gradient).

    ``smoothing``: see ``smoothed_cross_entropy``; it applies only to logits over bins. A flow policy needs a batch with
    noise and times (see ``draw_noise``); its error is that of the actions that the velocity predicts.
    """
    if policy.spec.flow is not None:
        return flow_matching(policy, batch)
    if policy.spec.action.bins:
        return token_loss(action_logits(policy, batch.inputs, batch.actions), batch, policy.spec.action, smoothing)
    parallel = cast(decode.Parallel, policy)
    predicted = decode.parallel(parallel, batch.inputs).actions
    loss = masked_mean((predicted - batch.actions).abs(), batch.real)
    return loss, loss.detach()


def masked_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of values (B, K, ...) over the steps marked by ``real`` (B, K)."""
    if real is None:
        return values.mean()
    weight = real.to(values.dtype).reshape(*real.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def action_logits(policy: PolicyModule, inputs: Inputs, actions: Tensor) -> Tensor:
    """Logits (B, K, D, rows) of every action token; autoregressive policies are teacher-forced with ``actions``."""
    if policy.spec.decode == "autoregressive":
        return decode.teacher_force(cast(decode.Autoregressive, policy), inputs, tokens_of(actions, policy.spec.action))
    parallel = cast(decode.Parallel, policy)
    return parallel.decode(decode.encode_images(parallel, inputs), inputs.ids, inputs.mask, inputs.state)


def bins_of(actions: Tensor, bins: int) -> Tensor:
    """Normalised actions -> bin indices; as rlrc.runtime.inference.preprocess.to_bins."""
    return ((actions.to(widest_float(actions.device)) + 1) / 2 * bins).floor().clamp(0, bins - 1).long()


def tokens_of(actions: Tensor, action: ActionSpec) -> Tensor:
    """Normalised actions -> tokens of the vocabulary if the policy has one, otherwise bin indices."""
    bins = bins_of(actions, action.bins)
    return bins if action.tokens is None else action.tokens.first - bins


def token_loss(logits: Tensor, batch: Batch, action: ActionSpec, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (B, K, D, rows), and the mean absolute error of the most likely actions."""
    if action.tokens is None:
        loss = masked_mean(smoothed_cross_entropy(logits, batch.actions, smoothing), batch.real)
    else:
        rows = tokens_of(batch.actions, action) - action.tokens.offset
        entropy = F.cross_entropy(logits.float().flatten(0, -2), rows.flatten(), reduction="none")
        loss = masked_mean(entropy.view(rows.shape), batch.real)
    with torch.no_grad():
        error = masked_mean((decode.outputs_from_logits(logits, action).actions - batch.actions).abs(), batch.real)
    return loss, error


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy (...) of logits (..., bins) to a Gaussian of ``smoothing`` bins around target (...) in [-1, 1]."""
    bins = logits.shape[-1]
    values = bin_centers(bins)
    centers = upload(torch.from_numpy(values), logits.device)
    distance = (target.clamp(float(values[0]), float(values[-1]))[..., None] - centers) * (bins / (2 * smoothing))
    weight = torch.softmax(-0.5 * distance**2, -1)
    return -(weight * F.log_softmax(logits, -1)).sum(-1)


def draw_noise(policy: PolicyModule, batch: Batch) -> Batch:
    """Add the noise and times that a flow policy's loss needs, from torch's generator. Other batches are unchanged.

    Times are 0.001 + 0.999 Beta(1.5, 1), as in pi0's training. A policy whose modulations are tabulated (see
    rlrc.compressor.prune.lossless) only has those of its flow steps.
    """
    spec = policy.spec
    if spec.flow is None:
        return batch
    noise = torch.randn(len(batch), spec.action.horizon, spec.flow.width)
    if policy.towers["expert"].tabulated:
        times = 1 - torch.randint(0, spec.flow.steps, (len(batch),)) / spec.flow.steps
    else:
        times = 0.001 + 0.999 * torch.distributions.Beta(1.5, 1.0, validate_args=False).sample((len(batch),))
    device = batch.actions.device
    return replace(batch, inputs=replace(batch.inputs, noise=upload(noise, device)), times=upload(times, device))


def flow_matching(policy: PolicyModule, batch: Batch) -> tuple[Tensor, Tensor]:
    """x = t noise + (1 - t) actions has the velocity noise - actions; padded dimensions are zeros."""
    spec, flow, noise, t = policy.spec, cast(decode.Flow, policy), batch.inputs.noise, batch.times
    assert spec.flow is not None
    assert noise is not None
    assert t is not None
    actions = F.pad(batch.actions, (0, spec.flow.width - spec.action.dim))
    x = torch.lerp(actions, noise, t[:, None, None])
    past, mask = flow.prefix(
        decode.encode_images(flow, batch.inputs), batch.inputs.ids, batch.inputs.mask, batch.inputs.state
    )
    velocity = flow.velocity(past, mask, batch.inputs.state, x, t)
    difference = (velocity.float() - (noise - actions))[..., : spec.action.dim]
    with torch.no_grad():  # actions = x - t velocity
        error = masked_mean((t[:, None, None] * difference).abs(), batch.real)
    return masked_mean(difference.square(), batch.real), error
