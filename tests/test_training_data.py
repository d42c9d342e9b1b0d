"""Policies of every family learn from a LeRobotDataset: pruned by Taylor scores, fine-tuned, distilled, and refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import DATA, FAMILIES, flags, source_of
from rlrc import artifact as artifacts
from rlrc.artifact import PolicySpec
from rlrc.compressor.cli.compress import compress
from rlrc.compressor.models.policy import Inputs
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.stages import artifact_io, distill, prune, quantize, sft, training_data
from rlrc.compressor.stages.sources import OfficialSource
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import sft as training_sft
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.distill import DistillConfig
from rlrc.datasets.meta import Feature
from rlrc.datasets.writer import Recording, write
from rlrc.errors import Interrupted, UserError
from rlrc.runtime.inference.preprocess import normalise, prepare

QUIET = StageOptions(evaluate=0, workers=1, threads=1)
TASKS = ("open the drawer", "put the red cube into the box on the left", "close it")


def record(path: Path, spec: PolicySpec, episodes: int = 3, length: int = 6) -> Path:
    """Episodes of random pictures and states, whose actions are one constant an episode."""
    random = np.random.default_rng(0)
    features = {
        f"observation.images.{camera.name}": Feature("image", (camera.height, camera.width, 3))
        for camera in spec.cameras
    }
    features["action"] = Feature("float32", (spec.action.dim,))
    if spec.state is not None:
        features["observation.state"] = Feature("float32", (len(spec.state.names),))

    def frames(episode: int) -> Iterator[dict[str, Any]]:
        for _ in range(length):
            values: dict[str, Any] = {}
            for name, feature in features.items():
                values[name] = random.integers(0, 256, feature.shape, np.uint8)
                if not feature.camera:
                    norm = spec.action.norm if name == "action" else spec.state.norm if spec.state else None
                    assert norm is not None
                    part = 0.5 * (episode - 1) if name == "action" else random.uniform(-0.5, 0.5, feature.shape)
                    values[name] = (np.array(norm.center) + part * np.array(norm.scale)).astype(np.float32)
            yield values

    write(path, 10, features, (Recording(TASKS[e % len(TASKS)], frames(e)) for e in range(episodes)))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    specs = {name: source_of(name).spec for name in FAMILIES}
    return {name: str(record(folder / name, spec)) for name, spec in specs.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_by_taylor_and_fine_tuned(name: str, data: dict[str, str], tmp_path: Path) -> None:
    keep = 0 if name in ("act", "openvla-oft-l1") else 1
    cut = PruneConfig(0.5, keep=keep, batches=2, batch=4, data=data[name])
    prune.run_prune(DATA / name / "checkpoint", tmp_path / "pruned", cut, QUIET, flags(name))
    config = SFTConfig(steps=30, batch=6, rate=3e-3, warmup=0, held_out=0.3, check_every=10, data=data[name])
    manifest = sft.run_sft(tmp_path / "pruned", tmp_path / "sft", config, QUIET)
    assert [entry.stage for entry in manifest.history] == ["official", "prune", "sft"]
    assert manifest.history[-1].config["data"] == data[name]
    assert manifest.history[-1].after["best_step"] in (10, 20, 30)
    (curve,) = (tmp_path / "sft" / "curves").iterdir()
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "held-out"] == [10, 20, 30]
    # It learned: the loss of the whole data set is lower than before.
    before, after = (loss(tmp_path / stage, data[name]) for stage in ("pruned", "sft"))
    assert after < before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "sft"]


def loss(path: Path, folder: str) -> float:
    from rlrc.compressor.stages.sources import ArtifactSource
    from rlrc.compressor.training.losses import chunk_loss, draw_noise

    source = ArtifactSource(artifacts.load(path))
    policy = source.load()
    batches = training_data.load_data(source, SFTConfig(data=folder)).batches
    assert isinstance(batches, training_data.DatasetBatches)
    torch.manual_seed(1)
    with torch.no_grad():
        return chunk_loss(policy, draw_noise(policy, batches.rows(batches.frames)))[0].item()


def test_batches_by_hand(data: dict[str, str]) -> None:
    """Frame 4 of the first episode of six: two steps are there, the others repeat the last and are not real."""
    name = "pi0"
    source = source_of(name)
    given = training_data.load_data(source, SFTConfig(data=data[name], seed=3))
    batches = given.batches
    assert isinstance(batches, training_data.DatasetBatches)
    assert len(batches) == 18
    assert given.held_out == []
    batch = batches.rows(np.array([4, 7]))
    horizon = source.spec.action.horizon
    assert batch.real is not None
    assert batch.real[0].tolist() == [i < 2 for i in range(horizon)]
    assert batch.real[1].tolist() == [i < 5 for i in range(horizon)]
    torch.testing.assert_close(batch.actions[0], torch.full_like(batch.actions[0], -0.5))
    torch.testing.assert_close(batch.actions[1], torch.zeros_like(batch.actions[1]), atol=1e-6, rtol=0)
    # The same as the runtime prepares one observation; the shorter prompt is masked behind its end.
    sample = batches.matched.samples([4])[0]
    alone = prepare(sample.observation, source.spec, source.tokenizer)
    assert batch.inputs.ids is not None
    assert batch.inputs.mask is not None
    assert batch.inputs.ids[0][batch.inputs.mask[0]].tolist() == alone.ids.tolist()
    np.testing.assert_array_equal(batch.inputs.pixels[0][0].numpy(), alone.pixels[0])
    assert source.spec.state is not None
    state = normalise(sample.observation["state"], source.spec.state.norm)
    assert batch.inputs.state is not None
    np.testing.assert_array_equal(batch.inputs.state[0, : len(state)].numpy(), state)
    # Drawn by a seed, and from where the generator was.
    kept, first = batches.state(), batches.draw(5).actions
    assert not torch.equal(batches.draw(5).actions, first)
    batches.restore(kept)
    assert torch.equal(batches.draw(5).actions, first)


def test_cameras_of_other_names_are_said(data: dict[str, str]) -> None:
    """The wrist's pictures where the policy expects those from the top."""
    source = source_of("openvla-oft-l1")
    first, second = (camera.name for camera in source.spec.cameras)
    plain = training_data.load_data(source, SFTConfig(data=data["openvla-oft-l1"])).batches
    crossed = {first: second, second: f"observation.images.{first}"}
    other = training_data.load_data(source, SFTConfig(data=data["openvla-oft-l1"], cameras=crossed)).batches
    ours, theirs = (batches.draw(2).inputs.pixels for batches in (plain, other))
    assert torch.equal(ours[0], theirs[1])
    assert torch.equal(ours[1], theirs[0])
    assert not torch.equal(ours[0], theirs[0])


def test_held_out_episodes_are_whole_and_never_drawn(data: dict[str, str]) -> None:
    source = source_of("act")
    given = training_data.load_data(source, SFTConfig(data=data["act"]), held_out=0.3, size=4)
    batches = given.batches
    assert isinstance(batches, training_data.DatasetBatches)
    assert [len(batch) for batch in given.held_out] == [4, 2]
    assert len(batches) == 12
    held = given.held_out[0].actions[0, 0, 0].item()
    assert held not in {round(batches.draw(1).actions[0, 0, 0].item(), 6) for _ in range(40)}


@pytest.mark.parametrize("name", ["openvla-oft-l1", "pi0"])
def test_distilled_and_adapted(name: str, data: dict[str, str], tmp_path: Path) -> None:
    given, hints = DATA / name / "checkpoint", flags(name)
    cut = PruneConfig(0.5, "magnitude", keep=0 if name == "openvla-oft-l1" else 1)
    prune.run_prune(given, tmp_path / "pruned", cut, QUIET, hints)
    config = DistillConfig(steps=4, batch=4, lora=2, warmup=0, data=data[name], teacher=str(given))
    manifest = distill.run_distill(tmp_path / "pruned", tmp_path / "out", config, QUIET, hints)
    assert manifest.history[-1].stage == "distill"
    policy = artifact_io.load_policy(artifacts.load(tmp_path / "out"))
    assert not any("lora" in key for key in policy.state_dict())


def test_a_recipe_s_own_teacher_may_need_flags(data: dict[str, str], tmp_path: Path) -> None:
    """pi0's head counts are in no tensor: the hints are those of what the recipe starts from, teacher included."""
    recipe = {
        "prune": PruneConfig(0.5, "magnitude"),
        "distill": DistillConfig(steps=2, batch=2, warmup=0, data=data["pi0"]),
    }
    compress(DATA / "pi0" / "checkpoint", tmp_path / "out", recipe, QUIET, flags("pi0"))
    history = artifacts.load(tmp_path / "out").manifest.history
    assert [entry.stage for entry in history] == ["official", "prune", "distill", "export"]
    assert history[2].config["teacher"] == str(DATA / "pi0" / "checkpoint")


def test_what_does_not_fit_is_refused_before_any_work(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OfficialSource, "load", lambda self: pytest.fail("work began before the refusal"))
    given, hints, out = DATA / "pi0" / "checkpoint", flags("pi0"), tmp_path / "out"
    spec = OfficialSource(given, hints).spec
    narrow = replace(
        spec.action,
        names=spec.action.names[:-1],
        norm=replace(spec.action.norm, center=spec.action.norm.center[:-1], scale=spec.action.norm.scale[:-1]),
    )
    wrong = record(tmp_path / "wrong", replace(spec, action=narrow), episodes=2, length=2)
    for folder, message in (
        (str(wrong), r"expected .*action.* found"),
        (str(tmp_path / "nowhere"), r"expected .*nowhere.* found"),
        (data["openvla"], r"expected .*found"),
        ("", r"expected demonstrations for .*family pi0; give --data FOLDER"),
    ):
        stages: list[tuple[Any, Any]] = [
            (sft.run_sft, SFTConfig(data=folder)),
            (prune.run_prune, PruneConfig(0.5, data=folder)),
        ]
        for run, config in stages:
            with pytest.raises(UserError, match=message) as error:
                run(given, out, config, QUIET, hints)
            assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


@pytest.mark.parametrize("name", ["openvla", "smolvla"])
def test_quantization_calibrates_on_a_data_set(
    name: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, real = list[Inputs](), quantize.quantize

    def spy(policy: Any, config: QuantizeConfig, calibration: Iterable[Inputs], *rest: Any) -> Any:
        drawn.extend(calibration)
        return real(policy, config, drawn, *rest)

    monkeypatch.setattr(quantize, "quantize", spy)
    checkpoint, config = DATA / name / "checkpoint", QuantizeConfig(method="gptq", data=data[name], samples=3)
    quantize.run_quantize(checkpoint, tmp_path / "out", config, QUIET, flags(name))
    assert [len(inputs.pixels[0]) for inputs in drawn] == [1, 1, 1]
    entry = artifacts.load(tmp_path / "out").manifest.history[-1]
    assert (entry.config["data"], entry.config["samples"]) == (data[name], 3)
    assert entry.after["rounding"]["action_error"] > 0
    with pytest.raises(UserError, match=r"expected .*missing"):
        missing = QuantizeConfig(method="gptq", data=str(tmp_path / "missing"))
        quantize.run_quantize(checkpoint, tmp_path / "other", missing, QUIET, flags(name))
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_with_the_same_checkpoint_only(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of one folder are not added to the weights that another download put in its place."""
    folder = shutil.copytree(DATA / "act/checkpoint", tmp_path / "folder")
    config = SFTConfig(steps=3, batch=2, rate=1e-4, warmup=0, lora=2, data=data["act"])

    def stop(metrics: dict[str, float], step: int, run: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_sft, "check_finite", stop)
        with pytest.raises(Interrupted):
            sft.run_sft(folder, tmp_path / "out", config, QUIET, flags("act"))
    assert (tmp_path / ".out.run/state.pt").exists()
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(UserError, match=r"expected to go on with the same stage, input .*model\.safetensors"):
        sft.run_sft(folder, tmp_path / "out", config, QUIET, flags("act"))
