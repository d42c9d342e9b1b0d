"""Every family computes on the device of its weights, and asks the host for nothing on the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_device import DEVICE, fake_device, on_device
from test_losses import batch_of
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)

from families import FAMILIES, official
from rlrc import artifact as artifacts
from rlrc.artifact import TOKENIZER, PolicySpec, TowerSpec
from rlrc.compressor.models import precision
from rlrc.compressor.models.device import upload
from rlrc.compressor.prune import importance
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.quantize import calibration
from rlrc.compressor.quantize.action_error import swap_tensors
from rlrc.compressor.quantize.calibration import collect_inputs
from rlrc.compressor.quantize.gptq import feedback, gptq
from rlrc.compressor.rl.actors import EncodedObservation, build_actor
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.objectives import PolicyObjective
from rlrc.compressor.rl.rollout import ActionSampler, SamplingMode
from rlrc.compressor.stages.artifact_io import read_observations
from rlrc.compressor.stages.sources import examples
from rlrc.compressor.training.batches import Batch, collate
from rlrc.compressor.training.losses import chunk_loss, draw_noise
from rlrc.runtime.inference.preprocess import prepare
from rlrc.runtime.inference.prompts import Tokenizer

EVERY = (*FAMILIES, "tiny")
ROWS = 3


@dataclass
class Case:
    """A family's geometry, and a batch on the host whose prompts have different lengths."""

    spec: PolicySpec
    towers: dict[str, TowerSpec]
    batch: Batch


@pytest.fixture(params=EVERY)
def case(request: pytest.FixtureRequest, tiny_artifact: Path) -> Case:
    if request.param == "tiny":
        artifact = artifacts.load(tiny_artifact)
        spec, towers = artifact.manifest.policy, artifact.manifest.towers
        assert spec.prompt is not None
        tokenizer: Tokenizer | None = Tokenizer(artifact.file(TOKENIZER), spec.prompt)
        arrays = read_observations(artifact.file("golden.npz"))
    else:
        source, _ = official(request.param)
        spec, towers, tokenizer = source.spec, source.towers, source.tokenizer
        arrays = examples(spec, tokenizer)
    texts = arrays.pop("instructions", None)
    arrays.pop("ids", None)
    rows: list[dict[str, Any]] = [{name: array[i] for name, array in arrays.items()} for i in range(ROWS)]
    for i, row in enumerate(rows):
        row |= {} if texts is None else {"instruction": str(texts[i])}
    inputs = collate([prepare(row, spec, tokenizer) for row in rows])
    return Case(spec, towers, Batch(inputs, torch.rand(ROWS, spec.action.horizon, spec.action.dim)))


def test_infer(case: Case) -> None:
    with fake_device() as device, torch.no_grad():
        policy, batch = on_device(case.spec, case.towers), case.batch.to(DEVICE)
        outputs = policy.act(batch.inputs)
        assert outputs.actions.device == DEVICE
    assert device.waits == 0


def test_loss_and_gradients(case: Case) -> None:
    with fake_device() as device:
        policy = on_device(case.spec, case.towers)
        loss, _ = chunk_loss(policy, draw_noise(policy, case.batch).to(DEVICE))
        loss.backward()
        assert all(parameter.grad.device == DEVICE for parameter in policy.parameters() if parameter.grad is not None)
    assert device.waits == 0


@pytest.mark.parametrize("score", ["taylor", "wanda"])
def test_scores(case: Case, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores come to the host when all batches are done: a copy for each block's heads and channels."""
    monkeypatch.setattr(importance, "check_finite", lambda *_: None)  # the host reads them, in the end
    config = PruneConfig(score=score, batches=2, batch=ROWS)  # type: ignore[arg-type]
    tower = "expert" if "expert" in case.towers else "decoder"
    blocks = range(len(case.towers[tower].layers))
    with fake_device() as device:
        policy = on_device(case.spec, case.towers)
        found = importance.score_parts(policy, tower, blocks, config, Drawn(case.batch))
        assert all(total.device.type == "cpu" for one in found for total in one.each())
    assert device.waits == 2 * len(blocks)


@dataclass
class Drawn:
    """A training set of one batch."""

    batch: Batch

    def __len__(self) -> int:
        return len(self.batch)

    def draw(self, size: int) -> Batch:
        return self.batch

    def state(self) -> Any: ...
    def restore(self, state: Any) -> None: ...


def test_rollout_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's part of a decision, for environments whose tasks have instructions of different lengths."""
    monkeypatch.setattr(precision, "autocast", lambda device: nullcontext())  # not for "meta"
    with fake_device() as device:
        sampler = ActionSampler(on_device(case.spec, case.towers), None, SamplingMode(sample=True))
        image_tokens, sampled, actions = sampler.act(case.batch.inputs)
        assert {x.device for x in (image_tokens, sampled, actions)} == {DEVICE}
        assert actions.shape == case.batch.actions.shape
    assert device.waits == 0


def test_reinforcement(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of what was sampled, PPO's loss with cloning, and their gradients."""
    monkeypatch.setattr(precision, "autocast", lambda device: nullcontext())
    with fake_device() as device:
        policy = on_device(case.spec, case.towers)
        objective, batch = PolicyObjective(build_actor(policy), PPOConfig()), draw_noise(policy, case.batch).to(DEVICE)
        with torch.no_grad():
            observation = objective.actor.encode(batch.inputs)
            sampled = objective.actor.act(observation, True)[1]
            old = objective(observation, sampled)
        loss, metrics = objective(observation, sampled, old.log_prob, torch.ones(ROWS, device=DEVICE), 1.0, batch)
        loss.backward()
        assert {value.device for value in metrics.values()} == {DEVICE}
    assert device.waits == 0


def test_calibration_and_error_feedback(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ROWS", 4)
    with fake_device() as device:
        policy, batch = on_device(case.spec, case.towers), case.batch.to(DEVICE)
        weights = {name: tensor for name, tensor in policy.state_dict().items() if tensor.ndim == 2}
        inputs = collect_inputs(policy, [batch.inputs], weights)
        assert {len(given) for given in inputs.values()} <= {3, 4}
        name = next(name for name in inputs if name.endswith("mlp.down.weight"))
        weight = F.pad(weights[name], (0, -weights[name].shape[1] % 32))
        rows = F.pad(inputs[name], (0, weight.shape[1] - inputs[name].shape[1]))
        integers, scales = gptq(weight, feedback(rows.to(weight.device)), 4, True)
        assert {integers.device, scales.device} == {DEVICE}
    assert device.waits == 0


def test_weights_from_the_host_go_where_they_are_used(case: Case) -> None:
    """Quantized weights are computed on the host, also where the policy is on the accelerator."""
    with fake_device(), torch.no_grad():
        policy, batch = on_device(case.spec, case.towers), case.batch.to(DEVICE)
        hosted = {name: torch.empty(tensor.shape) for name, tensor in policy.state_dict().items() if tensor.ndim == 2}
        with swap_tensors(policy, hosted):
            assert policy.act(batch.inputs).actions.device == DEVICE


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, other: x @ other,
        lambda x, other: x + other,
        lambda x, other: torch.cat([x, other]),
        lambda x, other: x[other[0].long()],
        lambda x, other: F.embedding(other.long(), x),
    ],
)
def test_what_is_left_on_the_host_is_found(mixed: Callable[[Tensor, Tensor], Tensor]) -> None:
    with fake_device():
        x = torch.zeros(4, 4, requires_grad=True).to(DEVICE)
        mixed(x, torch.zeros(4, 4).to(DEVICE))
        with pytest.raises(FakeTensorDeviceMismatchError):
            mixed(x, torch.zeros(4, 4))


def test_what_the_host_reads_is_found() -> None:
    with fake_device() as device:
        x = upload(torch.zeros(4), DEVICE)
        assert device.waits == 0
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x.unique()
        x.cpu()
        assert device.waits == 1
        torch.zeros(4).to(DEVICE)
    assert device.waits == 2


def test_a_weight_left_on_the_host_is_found(case: Case) -> None:
    with fake_device(), torch.no_grad():
        policy, batch = on_device(case.spec, case.towers), case.batch.to(DEVICE)
        norm = policy.get_submodule("decoder.layers.0.norm1")
        norm.weight = torch.nn.Parameter(torch.zeros(policy.towers["decoder"].width))
        with pytest.raises(FakeTensorDeviceMismatchError):
            policy.act(batch.inputs)


def test_lengths_follow_the_rows() -> None:
    """The host knows how long each prompt is, also of parts and of batches on the device."""
    batch = batch_of("openvla")[1]
    assert batch.inputs.mask is not None
    lengths = tuple(batch.inputs.mask.sum(1).tolist())
    assert len(set(lengths)) > 1
    assert batch.inputs.lengths == batch.to(DEVICE).inputs.lengths == lengths
    assert batch.part(slice(1, 3)).inputs.lengths == lengths[1:]
    assert batch.part(torch.tensor([2, 0])).inputs.lengths == (lengths[2], lengths[0])
    observation = EncodedObservation(torch.zeros(3, 1, 1), batch.inputs.ids, None, batch.inputs.mask, lengths)
    assert observation.rows(torch.tensor([1])).to(DEVICE).lengths == lengths[1:2]
