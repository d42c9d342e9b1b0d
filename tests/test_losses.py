"""The loss of every family, by hand or by another implementation, on the official formats' tiny checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from families import FAMILIES, official
from rlrc.compressor.models import decode
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.stages.sources import examples
from rlrc.compressor.training.batches import Batch, collate
from rlrc.compressor.training.losses import bins_of, chunk_loss, draw_noise, masked_mean, tokens_of
from rlrc.runtime.inference.preprocess import prepare, to_bins


def batch_of(name: str, rows: int = 3) -> tuple[PolicyModule, Batch]:
    """The instructions have different lengths."""
    source, policy = official(name)
    spec, arrays = policy.spec, examples(source.spec, source.tokenizer)
    texts = arrays.pop("instructions", None)
    arrays.pop("ids", None)
    observations = [{key: array[i] for key, array in arrays.items()} for i in range(rows)]
    for i, row in enumerate(observations):
        row |= {} if texts is None else {"instruction": str(texts[i])}
    torch.manual_seed(3)
    actions = torch.rand(rows, spec.action.horizon, spec.action.dim) * 1.8 - 0.9
    return policy, Batch(collate([prepare(row, spec, source.tokenizer) for row in observations]), actions)


def test_mean_over_what_is_real() -> None:
    values, real = torch.arange(12.0).view(2, 3, 2), torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, real).item() == pytest.approx((0 + 1 + 2 + 3 + 6 + 7) / 6)
    assert masked_mean(values, None).item() == pytest.approx(5.5)


@pytest.mark.parametrize("bins", [16, 255, 256])
def test_bins_are_the_runtime_s(bins: int) -> None:
    values = np.concatenate([np.linspace(-1.2, 1.2, 1001), np.arange(bins + 1) / bins * 2 - 1]).astype(np.float32)
    assert bins_of(torch.from_numpy(values), bins).tolist() == to_bins(values, bins).tolist()


def test_openvla_s_tokens_are_the_official_ones() -> None:
    """As the official ActionTokenizer writes them: vocabulary - digitize(action, 256 edges from -1 to 1)."""
    _, policy = official("openvla")
    action = policy.spec.action
    assert action.tokens is not None
    values = np.linspace(-1, 0.999, 500, dtype=np.float32)
    vocabulary = action.tokens.first + 1
    expected = vocabulary - np.digitize(values, np.linspace(-1, 1, action.bins + 1))
    assert tokens_of(torch.from_numpy(values), action).tolist() == expected.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_learns_and_padding_counts_nowhere(name: str) -> None:
    policy, batch = batch_of(name)
    batch = draw_noise(policy, batch)
    policy.requires_grad_(True).zero_grad()
    loss, error = chunk_loss(policy, batch)
    loss.backward()
    assert loss.item() > 0
    assert not error.requires_grad
    silent = [key for key, parameter in policy.named_parameters() if parameter.grad is None]
    policy.zero_grad()
    # ACT's first self-attention in the decoder mixes zeros: what makes queries and keys cannot matter, but is used.
    assert silent == []
    # Each prompt alone, not padded, gives the same loss.
    alone = []
    for i in range(len(batch)):
        row = batch.part(slice(i, i + 1))
        if row.inputs.mask is not None:
            assert row.inputs.ids is not None
            row.inputs.ids, row.inputs.mask = row.inputs.ids[:, row.inputs.mask[0]], None
        with torch.no_grad():
            alone.append(chunk_loss(policy, row)[0].item())
    assert loss.item() == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("name", ["act", "openvla-oft-l1", "openvla-oft-discrete", "pi0"])
def test_steps_behind_the_end_do_not_count(name: str) -> None:
    policy, batch = batch_of(name)
    batch = draw_noise(policy, batch)
    horizon = policy.spec.action.horizon
    assert horizon > 1
    real = torch.ones(len(batch), horizon, dtype=torch.bool)
    real[:, -1] = False
    with torch.no_grad():
        masked, _ = chunk_loss(policy, replace(batch, real=real))
        whole, _ = chunk_loss(policy, batch)
        assert masked.item() != pytest.approx(whole.item(), rel=1e-6)
        if policy.spec.flow is None:  # a flow policy's steps see each other's noisy values
            other = batch.actions.clone()
            other[:, -1] = 0.77
            assert chunk_loss(policy, replace(batch, actions=other, real=real))[0].item() == masked.item()


def test_autoregressive_cross_entropy_is_that_of_the_steps() -> None:
    """The driver's own steps, one token after the other, fed with the expert's."""
    policy, batch = batch_of("openvla")
    tokens = tokens_of(batch.actions, policy.spec.action).flatten(1)
    assert policy.spec.action.tokens is not None
    rows = tokens - policy.spec.action.tokens.offset
    losses: list[Tensor] = []
    with torch.no_grad():
        for i in range(len(batch)):
            row = batch.part(slice(i, i + 1)).inputs
            assert row.ids is not None
            ids = row.ids if row.mask is None else row.ids[:, row.mask[0]]
            past, given, image_tokens = None, ids, decode.encode_images(policy, row)
            for j in range(tokens.shape[1]):
                logits, past = policy.step(image_tokens if past is None else None, given, past)
                losses.append(F.cross_entropy(logits, rows[i : i + 1, j]))
                given = tokens[i : i + 1, j : j + 1]
        expected = torch.stack(losses).mean().item()
        assert chunk_loss(policy, batch)[0].item() == pytest.approx(expected, rel=1e-5)


def test_l1_by_hand() -> None:
    policy, batch = batch_of("openvla-oft-l1")
    with torch.no_grad():
        predicted = policy.act(batch.inputs).actions
        loss, error = chunk_loss(policy, batch)
    assert loss.item() == pytest.approx((predicted - batch.actions).abs().mean().item(), rel=1e-6)
    assert error.item() == loss.item()


@pytest.mark.parametrize("name", ["pi0", "smolvla"])
def test_flow_matching_by_hand(name: str) -> None:
    """x = t noise + (1 - t) actions, target noise - actions (lerobot's modeling_pi0.py writes it so too)."""
    policy, batch = batch_of(name)
    batch = draw_noise(policy, batch)
    spec, inputs, t = policy.spec, batch.inputs, batch.times
    assert t is not None
    assert inputs.noise is not None
    assert ((t >= 0.001) & (t <= 1)).all()
    padded = torch.zeros(len(batch), spec.action.horizon, spec.flow.width)
    padded[..., : spec.action.dim] = batch.actions
    x = torch.stack([t[i] * inputs.noise[i] + (1 - t[i]) * padded[i] for i in range(len(batch))])
    with torch.no_grad():
        past, mask = policy.prefix(decode.encode_images(policy, inputs), inputs.ids, inputs.mask, inputs.state)
        velocity = policy.velocity(past, mask, inputs.state, x, t)
        target = inputs.noise - padded
        expected = (velocity - target)[..., : spec.action.dim].square().mean().item()
        loss, error = chunk_loss(policy, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    reached = x - t[:, None, None] * velocity
    difference = (reached - padded)[..., : spec.action.dim].abs().mean().item()
    assert error.item() == pytest.approx(difference, rel=1e-4)


def test_times_are_beta_distributed_or_those_of_the_steps() -> None:
    policy, batch = batch_of("pi05")
    wide = Batch(batch.inputs, batch.actions[:1].expand(4000, -1, -1))
    torch.manual_seed(0)
    t = draw_noise(policy, wide).times
    assert t is not None
    # Beta(1.5, 1) has the mean 0.6 and the distribution function t ** 1.5.
    assert t.mean().item() == pytest.approx(0.001 + 0.999 * 0.6, abs=0.015)
    assert (t < 0.5).float().mean().item() == pytest.approx(0.5**1.5, abs=0.03)
    fixed = replace(policy.towers["expert"], norm="steps")
    towers = policy.towers
    try:
        policy.towers = towers | {"expert": fixed}
        t = draw_noise(policy, wide).times
    finally:
        policy.towers = towers
    assert t is not None
    assert sorted(set(t.tolist())) == pytest.approx([i / policy.spec.flow.steps for i in range(1, 11)])
