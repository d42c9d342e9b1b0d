"""Supervised fine-tuning: the loss and the schedule by hand, real short runs, and a run that is killed and resumed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.rl import dagger
from rlrc.compressor.rl.dagger import Dagger
from rlrc.compressor.rl.demonstrations import DemonstrationConfig, SampleBatches, Samples, demonstrations, ids_of_tasks
from rlrc.compressor.rl.rollout import Request, Rollouts, SamplingMode
from rlrc.compressor.training import sft as module
from rlrc.compressor.training.batches import TrainingData
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.losses import smoothed_cross_entropy
from rlrc.compressor.training.run_state import RunState
from rlrc.compressor.training.sft import build_optimizer, sft
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import DEMONSTRATION
from rlrc.errors import UserError


def test_smoothed_cross_entropy_by_hand() -> None:
    """Four bins with centers -0.75, -0.25, 0.25, 0.75, half a unit wide; smoothing one bin, target in the third.

    The bins are 2, 1, 0 and 1 standard deviations away: weights exp(-2), exp(-1/2), 1, exp(-1/2), normalised.
    """
    probability = [0.1, 0.2, 0.3, 0.4]
    logits = torch.tensor(probability).log()[None] + 5  # a constant changes nothing
    raw = [math.exp(-2), math.exp(-0.5), 1.0, math.exp(-0.5)]
    expected = -sum(w / sum(raw) * math.log(p) for w, p in zip(raw, probability, strict=True))
    loss = smoothed_cross_entropy(logits, torch.tensor([0.25]), 1.0)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    # Smoothing of two bins halves the distances.
    raw = [math.exp(-0.5), math.exp(-0.125), 1.0, math.exp(-0.125)]
    expected = -sum(w / sum(raw) * math.log(p) for w, p in zip(raw, probability, strict=True))
    assert smoothed_cross_entropy(logits, torch.tensor([0.25]), 2.0).item() == pytest.approx(expected, abs=1e-6)


def test_smoothed_cross_entropy_at_the_ends_and_over_a_batch() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4), torch.tensor([[-7.0, 0.1, 0.25], [0.75, 9.0, -0.6]])
    # What lies beyond the outermost centers counts as lying on them.
    clamped = smoothed_cross_entropy(logits, target.clamp(-0.75, 0.75), 1.0)
    torch.testing.assert_close(smoothed_cross_entropy(logits, target, 1.0), clamped)
    each = [[smoothed_cross_entropy(logits[i, j], target[i, j], 1.0).item() for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(clamped.numpy(), each, atol=1e-6)
    # With little smoothing it is the plain cross-entropy to the bin.
    sharp = smoothed_cross_entropy(logits[:1, :1], torch.tensor([[0.25]]), 0.05)
    assert sharp.item() == pytest.approx(-torch.log_softmax(logits[0, 0], -1)[2].item(), abs=1e-6)


def test_rate_by_hand() -> None:
    """Ten steps up, flat until half of the steps, then down to 2 %."""
    config = SFTConfig(steps=100, rate=2.0, warmup=10, decay=0.5)
    expected = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0, 50: 2.0, 75: 1.0, 90: 0.4, 99: 0.04}
    for step, rate in expected.items():
        assert config.rate_at(step) == pytest.approx(rate), step
    assert SFTConfig(steps=100, rate=2.0, warmup=10, decay=0.005).rate_at(99) == pytest.approx(2.0)
    assert SFTConfig(steps=200, rate=2.0, warmup=0, decay=1.0).rate_at(199) == pytest.approx(0.04)  # not 2 / 200
    assert SFTConfig(steps=100, rate=2.0, warmup=0, decay=0.0).rate_at(0) == 2.0


def test_rounds_by_hand() -> None:
    spread: Callable[..., dict[int, int]] = lambda **kw: SFTConfig(steps=1000, **kw).rounds()  # noqa: E731
    assert spread() == {}
    assert spread(dagger_rounds=1, dagger_start=0.25) == {250: 0}
    assert spread(dagger_rounds=3, dagger_start=0.1, dagger_end=0.9) == {100: 0, 500: 1, 900: 2}
    assert spread(dagger_rounds=2, dagger_start=0.0, dagger_end=1.0) == {
        0: 0,
        999: 1,
    }  # the last one has a step to serve


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"demonstrations": 0},
        {"dagger_episodes": 0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"smoothing": 0.0},
        {"warmup": -1},
        {"state_noise": -0.1},
        {"dagger_rounds": -1},
        {"seed": -1},
        {"decay": 1.5},
        {"dagger_start": -0.1},
        {"dagger_end": 1.01},
        {"dagger_start": 0.9, "dagger_end": 0.5},
        {"steps": 5, "dagger_rounds": 6},
        {"first_seed": 3_000_000},
        {"first_seed": DEMONSTRATION.stop - 10},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"expected sft\..*({'|'.join(wrong)}).*found") as error:
        SFTConfig(**wrong)
    assert "\n" not in str(error.value)


def test_only_matrices_decay(pupil: TinyPolicy) -> None:
    decayed, free = build_optimizer(pupil, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in pupil.named_parameters()}
    without = {names[id(parameter)] for parameter in free["params"]}
    assert {"embedding.weight", "query", "vision.position", "decoder.norm.weight", "state.bias"} <= without
    matrices = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"head.weight", "state.weight", "vision.layers.0.attention.qkv.weight"} <= matrices
    assert {name for name in matrices if "norm" in name or "bias" in name} == set()
    assert Counter([*matrices, *without]) == Counter(name for name, _ in pupil.named_parameters())


def test_dagger_requests(check_requests: Callable[..., list[Request]]) -> None:
    config = SFTConfig(dagger_rounds=3, dagger_episodes=400)
    drawn = check_requests(lambda number, failures: dagger.requests(config, number, failures), "faucet-open-v3")
    assert {request.seed for request in drawn} < set(DEMONSTRATION[500_000:])  # apart from plain demonstrations
    assert {request.task for request in drawn} == set(TASKS)  # none is forgotten
    handover = [request.handover for request in drawn[:400] if request.handover is not None]
    assert 0.5 < len(handover) / 400 < 0.7
    assert min(handover) >= 2
    assert max(handover) < 30


def test_no_seed_leaves_the_scenes_for_demonstrations() -> None:
    for seed in (4, 5, 31):  # 5 * 100,000 more than half a million: PPO's scenes begin there
        requests = dagger.requests(SFTConfig(seed=seed), 7, {})
        assert all(request.seed in DEMONSTRATION for request in requests)


def run_in(folder: Path, config: Any, rollouts: Rollouts) -> RunState:
    run = RunState(folder)
    run.open("sft", "parent", config)
    run.start_clock(rollouts)
    return run


def train(
    policy: TinyPolicy, config: SFTConfig, rollouts: Rollouts, run: RunState, progress: Callable[[int, str], None]
) -> dict[str, Any]:
    """As the stage does it."""
    samples = demonstrations(DemonstrationConfig(config.demonstrations), rollouts)
    batches = SampleBatches(samples, policy.spec, ids_of_tasks(rollouts.load_tokenizer()), config.seed)
    held_out = batches.all(50)[:1] if config.held_out else []
    return sft(policy, config, TrainingData(batches, held_out), run, progress, Dagger(config, rollouts, batches, run))


def curve(run: RunState) -> list[dict[str, Any]]:
    """Rows without what a clock measured."""
    rows = [json.loads(line) for line in run.curve_file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "cpu_seconds"} for row in rows]


def test_demonstrations_are_made_once(demos: Samples, rollouts: Rollouts, own_cache: Path) -> None:
    assert sorted(set(demos.task.tolist())) == list(range(13))
    assert demos.pictures.shape == (len(demos), 32, 32, 3)
    assert demos.chunk.shape == (len(demos), 5, 4)
    assert np.abs(demos.chunk).max() <= 1
    before = sorted((own_cache / "demonstrations").iterdir())
    rollouts.cpu_seconds = 0.0
    again = demonstrations(DemonstrationConfig(1), rollouts)
    assert rollouts.cpu_seconds == 0  # nobody simulated
    assert sorted((own_cache / "demonstrations").iterdir()) == before
    np.testing.assert_array_equal(again.chunk, demos.chunk)


def test_short_run_lowers_the_loss(pupil: TinyPolicy, demos: Samples, rollouts: Rollouts, tmp_path: Path) -> None:
    config = SFTConfig(steps=100, batch=32, rate=2e-3, warmup=10, demonstrations=1)
    run = run_in(tmp_path / "run", config, rollouts)
    shown: list[tuple[int, str]] = []
    train(pupil, config, rollouts, run, lambda step, text: shown.append((step, text.split()[0])))
    first, second = curve(run)
    assert (first["step"], second["step"]) == (50, 100)
    assert shown == [(i, "training" if i < 50 else "loss") for i in range(101)]
    # Knowing nothing costs log(16) = 2.77; the target's own entropy with two bins' smoothing is about 2.0.
    assert second["loss"] < first["loss"] - 0.1
    assert second["l1"] < first["l1"]
    assert first["samples"] == len(demos)
    assert not pupil.training


def test_killed_and_resumed_run_is_the_uninterrupted_one(
    make_pupil: Callable[[], TinyPolicy],
    demos: Samples,
    rollouts: Rollouts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_short: Callable[..., None],
) -> None:
    """Rounds of DAgger fall before the saved state, on its very step, and between it and the interruption."""
    monkeypatch.setattr(dagger, "SamplingMode", partial(SamplingMode, horizon=30))
    monkeypatch.setattr(module, "LOG_EVERY", 20)
    short: dict[str, Any] = {"steps": 80, "batch": 8, "warmup": 10, "demonstrations": 1}
    config = SFTConfig(**short, dagger_rounds=4, dagger_episodes=3, dagger_start=0.25, dagger_end=0.625)
    assert list(config.rounds()) == [20, 30, 40, 50]

    whole, straight = run_in(tmp_path / "whole", config, rollouts), make_pupil()
    train(straight, config, rollouts, whole, lambda step, text: None)

    def begun(progress: Callable[[int, str], None]) -> None:
        train(make_pupil(), config, rollouts, run_in(tmp_path / "cut", config, rollouts), progress)

    cut_short(begun, saved=40, killed=60)
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 40
    assert curve(RunState(tmp_path / "cut"))[-1]["step"] == 60  # the row after the saved state is dropped by resuming
    resumed, cut = make_pupil(), run_in(tmp_path / "cut", config, rollouts)
    shown: list[tuple[int, str]] = []
    train(resumed, config, rollouts, cut, lambda step, text: shown.append((step, text)))

    # Before it plays it says so; the round on the saved step was not saved with it.
    assert shown[0] == (40, "training")
    shown_rounds = [(step, text) for step, text in shown if text.startswith("DAgger")]
    assert shown_rounds == [(40, "DAgger round 3 of 4: 3 episodes"), (50, "DAgger round 4 of 4: 3 episodes")]
    assert shown[1] == shown_rounds[0]
    assert shown[-1][0] == 80
    assert curve(cut) == curve(whole)
    assert [row["stage"] for row in curve(whole)] == ["sft", *["dagger"] * 2, "sft", *["dagger"] * 2, "sft", "sft"]
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert cut.cpu_seconds() > cut.spent > 0


def test_run_without_a_saved_state_begins_anew(rollouts: Rollouts, tmp_path: Path) -> None:
    """What a run killed before its first save left is no obstacle, whatever it did, and its curve is not continued."""
    run = run_in(tmp_path / "run", SFTConfig(steps=10), rollouts)
    run.log("sft", 1, loss=1.0)
    other = run_in(tmp_path / "run", SFTConfig(steps=20), rollouts)
    assert not other.curve_file.exists()
    assert other.load() is None
