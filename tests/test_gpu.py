"""The stages' computations on a GPU against the same on the CPU: see scripts/gpu_check.sh."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_devices import Drawn
from torch import Tensor

from families import FAMILIES, official
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.prune import importance
from rlrc.compressor.prune.config import PruneConfig, tower_name
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize
from rlrc.compressor.stages.artifact_io import every_input
from rlrc.compressor.stages.sources import examples
from rlrc.compressor.training.batches import Batch
from rlrc.compressor.training.losses import chunk_loss, draw_noise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="expected a GPU, found none")]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # sums in another order


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> PolicyModule:
    return copy.deepcopy(official(request.param)[1])


def batch_of(policy: PolicyModule, name: str) -> Batch:
    source, action = official(name)[0], policy.spec.action
    inputs = next(every_input(policy.spec, examples(policy.spec, source.tokenizer)))
    torch.manual_seed(0)
    return draw_noise(policy, Batch(inputs, torch.rand(1, action.horizon, action.dim) * 2 - 1))


@pytest.fixture
def batch(policy: PolicyModule, request: pytest.FixtureRequest) -> Batch:
    return batch_of(policy, request.node.callspec.params["policy"])


def on_both(policy: PolicyModule, compute: Callable[[PolicyModule, torch.device], Any]) -> tuple[Any, Any]:
    return compute(policy, CPU), compute(copy.deepcopy(policy).to(GPU), GPU)


def test_actions(policy: PolicyModule, batch: Batch) -> None:
    def act(policy: PolicyModule, where: torch.device) -> Tensor:
        with torch.no_grad():
            outputs = policy.act(batch.inputs.to(where))
        return (outputs.actions if outputs.logits is None else outputs.logits).cpu()

    torch.testing.assert_close(*on_both(policy, act), **CLOSE)


def test_losses_and_gradients(policy: PolicyModule, batch: Batch) -> None:
    def gradients(policy: PolicyModule, where: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        policy.requires_grad_(True)
        loss, _ = chunk_loss(policy, batch.to(where))
        loss.backward()
        found = {name: p.grad.float().cpu() for name, p in policy.named_parameters() if p.grad is not None}
        return loss.detach().cpu(), found

    (loss, expected), (other, found) = on_both(policy, gradients)
    torch.testing.assert_close(other, loss, **CLOSE)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.02, atol=2e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("score", ["taylor", "wanda"])
def test_scores(policy: PolicyModule, batch: Batch, score: str) -> None:
    config = PruneConfig(score=score, batches=1, batch=1, keep=0)  # type: ignore[arg-type]
    tower = tower_name(policy.towers, config)
    blocks = range(len(policy.towers[tower].layers))

    def scores(policy: PolicyModule, where: torch.device) -> list[Tensor]:
        torch.manual_seed(0)  # of the flows' noise and times
        found = importance.score_parts(policy, tower, blocks, config, Drawn(batch))
        return [total for one in found for total in one.each()]

    for expected, found in zip(*on_both(policy, scores), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantization(policy: PolicyModule, batch: Batch, method: str) -> None:
    """Rounding at a tie may differ in a few integers, but not the actions' error."""

    def error(policy: PolicyModule, where: torch.device) -> float:
        config = QuantizeConfig(method=method)  # type: ignore[arg-type]
        return float(quantize(policy, config, [batch.inputs.to(where)]).report["action_error"])

    expected, found = on_both(policy, error)
    assert found == pytest.approx(expected, rel=0.05)
