"""Losses that say that data or rate do not fit the policy are reported once; those of right training are not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_sft_options import run_in, training_data

from families import official, source_of
from rlrc.artifact import HistoryEntry
from rlrc.compressor.models.policy import Inputs
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.rl.demonstrations import SampleBatches
from rlrc.compressor.stages.stage import Stage
from rlrc.compressor.training import sft
from rlrc.compressor.training.batches import Batch, TrainingData, collate
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.distill import DistillConfig
from rlrc.compressor.training.loss_watch import LossWatch, ignorant_chunk_loss
from rlrc.compressor.training.losses import chunk_loss, masked_mean, smoothed_cross_entropy
from rlrc.runtime.inference.preprocess import prepare


def batch_of(actions: list[list[list[float]]], real: list[list[bool]] | None = None, noise: float = 0.0) -> Batch:
    rows = torch.tensor(actions)
    wide = torch.full((*rows.shape[:2], 32), noise)
    return Batch(Inputs([], noise=wide), rows, None if real is None else torch.tensor(real))


def test_the_loss_of_a_policy_that_ignores_what_it_sees_by_hand() -> None:
    numbers = source_of("openvla-oft-l1").spec
    # The mean of 0, 0.4 and 0.8 is 0.4; the last step is not real.
    batch = batch_of([[[0.0], [0.4]], [[0.8], [9.0]]], [[True, True], [True, False]])
    assert ignorant_chunk_loss(numbers, batch) == pytest.approx((0.4 + 0.0 + 0.4) / 3)
    assert ignorant_chunk_loss(numbers, batch_of([[[-50.0]], [[50.0]]])) == 1.0  # not normalised
    flow = source_of("pi0").spec
    flow = replace(flow, action=replace(flow.action, names=("x",)))
    assert ignorant_chunk_loss(flow, batch_of([[[0.5]], [[-0.5]]], noise=1.0)) == pytest.approx((0.25 + 2.25) / 2)
    assert ignorant_chunk_loss(flow, batch_of([[[50.0]]], noise=1.0)) == 2.0
    tokens = source_of("openvla").spec
    assert ignorant_chunk_loss(tokens, batch) == pytest.approx(math.log(tokens.action.bins))


def test_that_is_what_the_losses_give() -> None:
    """Equal logits cost ln(bins) whatever the target; with a velocity of zero, flow matching costs its limit."""
    for target in (-1.0, 0.3, 7.0):
        loss = smoothed_cross_entropy(torch.zeros(1, 16), torch.tensor([target]), 2.0)
        assert loss.item() == pytest.approx(math.log(16), rel=1e-6)
    noise = torch.randn(100_000, 1, 1, generator=torch.Generator().manual_seed(0))
    assert float(masked_mean((noise - 0.5).square(), None)) == pytest.approx(1 + 0.5**2, rel=0.02)
    assert SFTConfig().ignorant_loss(3.0) == 3.0
    assert DistillConfig(task=0.5, hidden=2.0).ignorant_loss(3.0) == 0.5 * 3.0 + 2.0


def watched(rate: float = 0.1) -> tuple[LossWatch, list[tuple[int, str]]]:
    given: list[tuple[int, str]] = []
    return LossWatch(lambda step, text, *_: given.append((step, text)), rate, "FOLDER"), given


def test_the_first_loss() -> None:
    watch, given = watched()
    watch.first(2.9, 2.77, learned=False)  # random or pruned weights
    watch.first(2.7, 2.77, learned=True)
    assert given == []
    watch.first(2.9, 2.77, learned=True)
    ((step, text),) = given
    assert step == 1
    assert text.startswith("the first loss is 2.9, above 2.77, that of a policy that ignores what it sees")
    assert "--cameras" in text
    assert "\n" not in text


def test_a_rise_by_hand() -> None:
    """From 1.0 of at most 3.0, a tenth of the way is 1.2; below that, or within the noise, nothing is said."""
    watch, given = watched(rate=0.25)
    watch.first(1.0, 3.0, learned=True)
    for end, mean in ((2, 1.0), (4, 1.19), (6, 0.5), (8, 1.21), (10, 2.0)):
        for loss in (mean - 1e-4, mean + 1e-4):
            watch.step(loss)
        watch.window(end)
    ((step, text),) = given
    assert step == 8
    assert text.startswith("the loss rose from 1 at the start to 1.21 at step 8: the rate 0.25 is too high")
    assert "remove FOLDER" in text
    # Neighbours differ by 1, so a batch has a variance of 0.5, and the difference of two means of two that of 0.5.
    for second, expected in ((3.8, []), (3.9, [4])):
        noisy, given = watched()
        for end, mean in ((2, 1.0), (4, second)):
            for loss in (mean - 0.5, mean + 0.5):
                noisy.step(loss)
            noisy.window(end)
        assert [step for step, _ in given] == expected  # 1 + 4 * sqrt(0.5) = 3.83


def test_new_samples_are_a_new_start() -> None:
    """DAgger's are harder: the loss rises although nothing is wrong."""
    watch, given = watched()
    watch.first(1.0, 3.0, learned=True)
    watch.step(1.0)
    watch.renew()
    for loss in (2.5, 2.5, 2.4):
        watch.step(loss)
        watch.window(1)
    assert given == []


def test_what_is_lost_within_the_first_window() -> None:
    """From 1.0 of at most 3.0, a tenth of the way is 1.2; random weights have nothing to lose.

    The losses grow by 0.1, so a batch has a variance of 0.005: the first differs from a mean of three by less than
    4 * sqrt(0.005 * 4 / 3) = 0.33 by chance. However noisy, above 3.0 nothing is left of what the policy knew.
    """
    for learned, first, expected in ((True, 1.24, [3]), (True, 1.22, []), (False, 1.24, [])):
        watch, given = watched()
        watch.first(1.0, 3.0, learned)
        for step in range(3):
            watch.step(first + 0.1 * step)
        watch.window(3)
        assert [step for step, _ in given] == expected
    for high, expected in ((5.1, [2]), (4.9, [])):
        watch, given = watched()
        watch.first(1.0, 3.0, learned=True)
        watch.step(1.0)
        watch.step(high)
        watch.window(2)
        assert [step for step, _ in given] == expected


def test_held_out_losses_by_hand() -> None:
    """Three rises in a row, and a tenth of the way from the lowest (1.0) to 3.0."""
    watch, given = watched()
    watch.first(2.0, 3.0, learned=False)
    for step, loss in enumerate((2.0, 1.0, 1.1, 1.2, 1.15, 1.16, 1.17, 1.19, 1.3, 1.4)):
        watch.held_out(step, loss)
    ((step, text),) = given
    assert step == 8
    assert text.startswith("the held-out loss rose 4 times in a row, to 1.3 at step 8 from 1 at step 1")


def test_a_resumed_run_says_nothing_twice() -> None:
    watch, given = watched()
    watch.first(9.0, 3.0, learned=True)
    saved = watch.state()
    watch.step(1.0)
    again, later = watched()
    again.restore(saved)
    assert (again.losses, again.limit) == ([], 3.0)
    again.first(9.0, 3.0, learned=True)
    assert (len(given), later) == (1, [])


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["new"], False),
        (["official"], True),
        (["new", "sft"], True),
        (["official", "prune"], False),
        (["official", "lossless"], True),
        (["official", "prune", "sft", "lossless"], True),
        (["new", "sft", "prune"], False),
    ],
    ids=str,
)
def test_only_policies_that_were_trained_and_not_cut_should_begin_low(stages: list[str], expected: bool) -> None:
    history = [
        HistoryEntry("prune" if name == "lossless" else name, {"lossless": name == "lossless"}, "0", None, 0.0)
        for name in stages
    ]
    source: Any = type("Source", (), {"history": history})
    assert Stage("sft", source, *[None] * 6, {}).learned() == expected  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def learned(make_pupil: Callable[[], TinyPolicy], tmp_path_factory: pytest.TempPathFactory) -> TinyPolicy:
    """A policy that knows its few samples by heart."""
    policy, config = make_pupil(), SFTConfig(steps=150, batch=24, rate=5e-3, warmup=0, state_noise=0)
    sft.sft(policy, config, training_data(policy), run_in(tmp_path_factory.mktemp("run") / "run", config), no_progress)
    return policy


def no_progress(step: int, text: str) -> None: ...


def go_on(
    learned: TinyPolicy,
    make_pupil: Callable[[], TinyPolicy],
    folder: Path,
    change: Callable[[np.ndarray], np.ndarray] = lambda chunk: chunk,
    **settings: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """-> the metrics of a training that starts from ``learned``, and the curve's warnings."""
    policy = make_pupil()
    policy.load_state_dict(learned.state_dict())
    data: TrainingData = training_data(policy)
    assert isinstance(data.batches, SampleBatches)
    data.batches.samples.chunk = change(data.batches.samples.chunk)
    config = SFTConfig(**{"steps": 20, "batch": 24, "rate": 1e-4, "warmup": 0} | settings)
    run = run_in(folder, config)
    report = sft.sft(policy, config, data, run, no_progress, learned=True)
    rows = [json.loads(line) for line in run.curve_file.read_text().splitlines()] if run.curve_file.exists() else []
    return report, [row for row in rows if row["stage"] == "warning"]


def test_right_data_and_a_right_rate_give_no_warning(
    learned: TinyPolicy,
    make_pupil: Callable[[], TinyPolicy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sft, "LOG_EVERY", 5)
    assert go_on(learned, make_pupil, tmp_path / "run") == ({}, [])
    assert "warning" not in capsys.readouterr().err


def test_the_actions_of_others_beyond_the_range_are_reported_once(
    learned: TinyPolicy, make_pupil: Callable[[], TinyPolicy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, rows = go_on(learned, make_pupil, tmp_path / "run", lambda chunk: -40 * chunk)
    (warning,) = report["warnings"]
    assert warning.startswith("the first loss is ")
    assert capsys.readouterr().err == f"warning: {warning}\n"
    ((step, loss, limit),) = [(row["step"], row["loss"], row["limit"]) for row in rows]
    assert step == 1
    assert loss > limit == pytest.approx(math.log(16), abs=1e-5)


def test_an_absurd_rate_is_reported_once(
    learned: TinyPolicy,
    make_pupil: Callable[[], TinyPolicy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sft, "LOG_EVERY", 5)
    report, rows = go_on(learned, make_pupil, tmp_path / "run", rate=0.3, warmup=10)
    (warning,) = report["warnings"]
    assert warning.startswith("the loss rose from ")
    assert f"the rate 0.3 is too high for this policy; stop, remove {tmp_path / 'run'}" in warning
    assert capsys.readouterr().err == f"warning: {warning}\n"
    assert len(rows) == 1


def test_what_is_learned_by_heart_is_reported_by_the_held_out_loss(
    make_pupil: Callable[[], TinyPolicy], tmp_path: Path
) -> None:
    """And not as a rise of the training's loss, which falls."""
    config = SFTConfig(steps=200, batch=16, rate=5e-3, warmup=0, held_out=0.2, check_every=20)
    policy = make_pupil()
    data = training_data(policy, held_out=24)
    report = sft.sft(policy, config, data, run_in(tmp_path / "run", config), no_progress)
    (warning,) = report["warnings"]
    assert warning.startswith("the held-out loss rose 3 times in a row")


def test_numbers_by_the_statistics_of_another_robot() -> None:
    """L1 of actions that are far out of range is above the limit, which they do not raise."""
    source, policy = official("act")
    given = source.observations()
    rows = [prepare({name: array[i] for name, array in given.items()}, source.spec, None) for i in range(2)]
    inputs = collate(rows)
    wrong = Batch(inputs, torch.full((2, source.spec.action.horizon, source.spec.action.dim), 30.0))
    wrong.actions[0] = -30
    with torch.no_grad():
        loss = chunk_loss(policy, wrong)[0].item()
    assert loss > ignorant_chunk_loss(source.spec, wrong) == 1.0
