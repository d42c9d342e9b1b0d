"""What supervised fine-tuning offers besides: adapters, held-out loss and early stop, parts of a batch, a cosine."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlrc import interrupts
from rlrc.compressor.models.nn.linear import Linear, widen
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.models.weights import tensors_of
from rlrc.compressor.rl.demonstrations import SampleBatches, Samples
from rlrc.compressor.training import lora, sft
from rlrc.compressor.training import run_state as run_module
from rlrc.compressor.training.batches import Batch, TrainingData
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.run_state import RunState
from rlrc.errors import Interrupted, UserError


def samples(number: int, size: int = 32) -> Samples:
    """Noise, which can only be memorised."""
    random = np.random.default_rng(0)
    return Samples(
        random.integers(0, 256, (number, size, size, 3), np.uint8),
        random.normal(size=(number, 7)).astype(np.float32),
        random.integers(0, 13, number),
        random.uniform(-1, 1, (number, 5, 4)).astype(np.float32),
    )


def training_data(policy: PolicyModule, number: int = 24, held_out: int = 0, seed: int = 0) -> TrainingData:
    ids = np.random.default_rng(1).integers(0, 7, (13, 6))
    batches = SampleBatches(samples(number + held_out), policy.spec, ids, seed)
    kept = batches.rows(np.arange(number, number + held_out))
    batches.samples = samples(number)
    return TrainingData(batches, [kept] if held_out else [])


def run_in(folder: Path, config: SFTConfig) -> RunState:
    run = RunState(folder)
    run.open("sft", "parent", config)
    run.start_clock(None)
    return run


def train(policy: TinyPolicy, config: SFTConfig, folder: Path, data: TrainingData, **options: Any) -> dict[str, Any]:
    found = sft.sft(policy, config, data, run_in(folder, config), options.pop("progress", lambda *_: None), **options)
    widen(policy)
    return found


def test_cosine_by_hand() -> None:
    """From the peak at the start to 2 % at the end: 0.51 + 0.49 cos."""
    config = SFTConfig(steps=100, rate=2.0, warmup=0, schedule="cosine")
    assert config.rate_at(0) == pytest.approx(2.0)
    assert config.rate_at(50) == pytest.approx(2.0 * 0.51)
    assert config.rate_at(25) == pytest.approx(2.0 * (0.51 + 0.49 * math.sqrt(0.5)))
    assert config.rate_at(99) == pytest.approx(0.04, abs=1e-3)
    assert replace(config, warmup=10).rate_at(4) == pytest.approx(0.5 * config.rate_at(4))


def test_parts_of_a_batch_give_the_same_step(make_pupil: Callable[[], TinyPolicy], tmp_path: Path) -> None:
    """Gradients of four parts add up to those of the whole; bfloat16 rounds them a little differently."""
    trained = []
    for parts in (1, 4):
        policy, config = make_pupil(), SFTConfig(steps=1, batch=16, accumulate=parts, warmup=0, weight_decay=0)
        gradients: dict[str, torch.Tensor] = {}

        def keep(team: Any, module: nn.Module, norm: float, kept: dict[str, torch.Tensor] = gradients) -> Any:
            kept |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            return torch.zeros(())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft.Team, "clip", keep)
            train(policy, config, tmp_path / str(parts), training_data(policy))
        trained.append(gradients)
    assert trained[0].keys() == trained[1].keys()
    for name, gradient in trained[0].items():
        torch.testing.assert_close(trained[1][name], gradient, rtol=0.05, atol=2e-3 * float(gradient.abs().max()))


def test_adapters_start_as_nothing_and_merge_into_the_weights(make_pupil: Callable[[], TinyPolicy]) -> None:
    policy, plain = make_pupil(), make_pupil()
    names = list(plain.state_dict())
    lora.adapt(policy, 4)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name and name.startswith("decoder.layers.") for name in trained)
    assert len(trained) == 2 * 7 * 4  # A and B of q, k, v, o, gate, up, down of four blocks
    batch = training_data(plain).batches.draw(5)
    pixels, ids, state = batch.inputs.pixels[0], batch.inputs.ids, batch.inputs.state
    with torch.no_grad():
        assert torch.equal(policy(pixels, ids, state), plain(pixels, ids, state))
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
        adapted = policy(pixels, ids, state)
        lora.merge(policy)
        assert list(policy.state_dict()) == names
        torch.testing.assert_close(policy(pixels, ids, state), adapted, atol=1e-4, rtol=1e-4)
    widen(policy)
    product = policy.decoder.layers[1].attention.q.weight - plain.decoder.layers[1].attention.q.weight
    assert torch.linalg.matrix_rank(product, tol=1e-4).item() == 4
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_adapters_are_added_to_narrow_weights_without_rounding(make_pupil: Callable[[], TinyPolicy]) -> None:
    policy = make_pupil()
    layer = policy.decoder.layers[1].attention.q
    layer.weight.data = layer.weight.data.bfloat16()
    narrow = layer.weight.detach().clone()
    lora.adapt(policy, 4)
    adapted: Any = policy.decoder.layers[1].attention.q
    with torch.no_grad():
        for parameter in (adapted.lora_A.default.weight, adapted.lora_B.default.weight):
            assert parameter.dtype == torch.float32
            parameter.normal_(std=0.1)
    product = adapted.lora_B.default.weight @ adapted.lora_A.default.weight
    lora.merge(policy)
    assert policy.decoder.layers[1].attention.q is layer
    assert torch.equal(layer.read(), narrow.float() + product)
    assert torch.equal(tensors_of(policy)["decoder.layers.1.attention.q.weight"], narrow.float() + product)


def test_adapters_begin_alike_whatever_the_weights_are_stored_in(make_pupil: Callable[[], TinyPolicy]) -> None:
    wide, narrow = make_pupil(), make_pupil()
    for module in narrow.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.bfloat16()
    begun = list[dict[str, torch.Tensor]]()
    for policy in (wide, narrow):
        torch.manual_seed(0)
        lora.adapt(policy, 4)
        begun.append({name: tensor for name, tensor in policy.state_dict().items() if ".lora_" in name})
    assert begun[0].keys() == begun[1].keys()
    assert all(torch.equal(begun[0][name], begun[1][name]) for name in begun[0])
    assert narrow.decoder.layers[0].attention.q.get_base_layer().weight.dtype == torch.bfloat16


def test_the_state_of_a_run_with_adapters_holds_only_these(
    make_pupil: Callable[[], TinyPolicy], tmp_path: Path, cut_short: Callable[..., None]
) -> None:
    policy, config = make_pupil(), SFTConfig(steps=4, batch=8, lora=2, warmup=0, checkpointing=True)
    cut_short(lambda progress: train(policy, config, tmp_path / "run", training_data(policy), progress=progress), 2)
    saved = torch.load(tmp_path / "run/state.pt", weights_only=True)
    assert saved["policy"]
    assert all(".lora_" in name for name in saved["policy"])


def test_training_with_adapters_changes_what_is_adapted_only(
    make_pupil: Callable[[], TinyPolicy], tmp_path: Path
) -> None:
    policy, plain = make_pupil(), make_pupil()
    train(policy, SFTConfig(steps=3, batch=8, lora=2, warmup=0), tmp_path / "run", training_data(policy))
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, plain.state_dict()[name])}
    assert changed == {f"{name}.weight" for name in lora.targets(plain)}


def test_the_weights_with_the_lowest_held_out_loss_are_kept(
    make_pupil: Callable[[], TinyPolicy], tmp_path: Path
) -> None:
    """The policy memorises noise, so what is held out gets worse: training stops after two checks without a gain."""
    config = SFTConfig(steps=400, batch=16, rate=5e-3, warmup=0, held_out=0.2, check_every=10, patience=2)
    policy = make_pupil()
    run = run_in(tmp_path / "run", config)
    data = training_data(policy, held_out=24)
    report = sft.sft(policy, config, data, run, lambda *_: None)
    rows = [json.loads(line) for line in run.curve_file.read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["stage"] == "held-out"}
    assert report["best_step"] == min(losses, key=lambda step: losses[step])
    assert max(losses) == report["best_step"] + 20 < 400
    with torch.no_grad():
        found = sft.SFTObjective(policy, config.smoothing)(data.held_out[0])["loss"].item()
    assert found == pytest.approx(report["held_out_loss"], abs=2e-5)
    assert found == pytest.approx(min(losses.values()), abs=2e-5)


def test_resumed_run_remembers_its_best_and_its_adapters(
    make_pupil: Callable[[], TinyPolicy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_short: Callable[..., None],
) -> None:
    monkeypatch.setattr(sft, "LOG_EVERY", 10)
    config = SFTConfig(steps=40, batch=8, rate=2e-2, warmup=0, held_out=0.2, check_every=10, lora=2)
    straight, resumed, data = make_pupil(), make_pupil(), lambda: training_data(straight, held_out=8)
    whole = train(straight, config, tmp_path / "whole", data())

    cut_short(lambda progress: train(make_pupil(), config, tmp_path / "cut", data(), progress=progress), 20, 30)
    assert train(resumed, config, tmp_path / "cut", data()) == whole
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("step", [0, 9, 20, 23])
def test_a_signal_in_the_middle_of_a_step_loses_nothing_but_that_step(
    make_pupil: Callable[[], TinyPolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """It arrives after a batch was drawn; the saved state is that before. Step 20 follows a held-out loss."""
    monkeypatch.setattr(sft, "LOG_EVERY", 7)
    config = SFTConfig(steps=30, batch=8, rate=2e-2, warmup=0, held_out=0.2, check_every=10, lora=2)
    straight, resumed, given = make_pupil(), make_pupil(), lambda: training_data(straight, held_out=8)
    whole = train(straight, config, tmp_path / "whole", given())
    real, calls = sft.compute_gradients, []

    def interrupted(*arguments: Any) -> dict[str, float]:
        found = real(*arguments)
        calls.append(found)
        if len(calls) == step + 1:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(sft, "compute_gradients", interrupted)
    with interrupts.raise_on_signal(), pytest.raises(Interrupted):
        train(make_pupil(), config, tmp_path / "cut", given())
    assert (tmp_path / "cut" / "state.pt").exists() == (step > 0)
    assert train(resumed, config, tmp_path / "cut", given()) == whole
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    rows = [
        [{name: value for name, value in json.loads(line).items() if name != "cpu_seconds"} for line in text]
        for text in ((tmp_path / name / "curve.jsonl").read_text().splitlines() for name in ("whole", "cut"))
    ]
    assert rows[0] == rows[1]


def test_a_state_is_saved_by_time_and_less_often_where_that_takes_long(
    make_pupil: Callable[[], TinyPolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step begins at 50 s, and each takes as long. Saving takes 1 s: every third; 20 s: every fourth."""
    clock, real, saved = [0.0], RunState.save, list[int]()
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])

    def trained(folder: Path, seconds: float) -> list[int]:
        saved.clear()

        def save(run: RunState, step: int, **state: Any) -> None:
            real(run, step, **state)
            saved.append(step)
            clock[0] += seconds

        def progress(step: int, text: str) -> None:
            clock[0] += 50

        monkeypatch.setattr(RunState, "save", save)
        train(make_pupil(), SFTConfig(steps=10, batch=4), folder, training_data(make_pupil()), progress=progress)
        return list(saved)

    assert trained(tmp_path / "quick", 1.0) == [4, 7, 10]
    assert trained(tmp_path / "slow", 20.0) == [4, 8, 10]


def test_a_loss_that_is_none_stops_and_keeps_the_last_state(
    pupil: TinyPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_short: Callable[..., None]
) -> None:
    config = SFTConfig(steps=10, batch=4, warmup=0)
    data = training_data(pupil)
    cut_short(lambda progress: train(pupil, config, tmp_path / "run", data, progress=progress), 2)
    draw, drawn = data.batches.draw, []

    def poisoned(size: int) -> Batch:
        batch = draw(size)
        drawn.append(batch)
        if len(drawn) == 2:
            batch.inputs = Inputs(batch.inputs.pixels, batch.inputs.ids, batch.inputs.state * math.nan)
        return batch

    monkeypatch.setattr(data.batches, "draw", poisoned)
    with pytest.raises(UserError, match=r"expected a finite loss, found nan at step 4; .* keeps the state of step 2"):
        train(pupil, config, tmp_path / "run", data)
    kept = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(tensor.isfinite().all() for tensor in kept["policy"].values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulate": 0},
        {"accumulate": 3},
        {"lora": -1},
        {"held_out": 1.0},
        {"held_out": -0.1},
        {"patience": 2},
        {"check_every": 0},
        {"data": "somewhere", "dagger_rounds": 1},
        {"schedule": "step"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected sft\..*found") as error:
        SFTConfig(**wrong)
    assert "\n" not in str(error.value)
