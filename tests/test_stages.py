"""The stages end to end with a tiny policy: artifact in, artifact out, and nothing written after a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlrc import artifact as artifacts
from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.artifact import folder as artifact_folder
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.compress import compress
from rlrc.compressor.cli.runners import runner
from rlrc.compressor.models import weights
from rlrc.compressor.models.nn.linear import widen
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.rl import dagger, ppo, simulation
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.demonstrations import Samples
from rlrc.compressor.rl.rollout import Rollouts, SamplingMode
from rlrc.compressor.stages import artifact_io, prune, quantize, reference, rl
from rlrc.compressor.stages import sft as sft_stage
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import sft
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.run_state import RunState
from rlrc.envs.metaworld import TASKS
from rlrc.errors import Interrupted, UserError

QUIET = StageOptions(evaluate=0, workers=1, threads=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, rollouts: Rollouts, demos: Samples) -> None:
    """Episodes of 10 steps in the worker that all tests share; ``demos`` are in the cache."""
    monkeypatch.setattr(simulation, "Rollouts", lambda *_: nullcontext(rollouts))
    for module in (simulation, dagger, ppo):
        monkeypatch.setattr(module, "SamplingMode", partial(SamplingMode, horizon=10))


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_prune_sft_rl_quantize(quick: None, pupil_artifact: Path, tmp_path: Path) -> None:
    options = StageOptions(evaluate=1, workers=1, threads=1)
    configs = {
        "prune": PruneConfig(ratio=0.5, batches=2, demonstrations=1),
        "sft": SFTConfig(steps=50, batch=8, warmup=5, demonstrations=1),
        "rl": PPOConfig(iterations=2, episodes=3, warmup=1, minibatch=4, behaviour_batch=8, demonstrations=1),
        "quantize": QuantizeConfig(exempt=("head.weight",)),
    }
    source, made = pupil_artifact, [artifacts.load(pupil_artifact)]
    for name, config in configs.items():
        manifest = runner(name)(source, tmp_path / name, config, options)
        source = tmp_path / name
        made.append(artifacts.load(source))  # with every hash
        assert artifacts.to_json(made[-1].manifest) == artifacts.to_json(manifest)
    assert listing(tmp_path) == ["prune", "quantize", "rl", "sft"]  # no run folder, no draft is left

    history = made[-1].manifest.history
    assert [entry.stage for entry in history] == ["new", *configs]
    for i, (artifact, entry) in enumerate(zip(made[1:], history[1:], strict=True)):
        assert artifact.manifest.history == history[: i + 2]
        assert entry.parent == made[i].digest
        assert entry.config == json.loads(json.dumps(vars(list(configs.values())[i])))
        for metrics in (entry.before, entry.after):
            assert set(metrics["per_task"]) == set(TASKS)
            assert metrics["episodes"] == 13
            assert metrics["success"] == pytest.approx(np.mean(list(metrics["per_task"].values())), abs=1e-4)
        assert entry.cpu_minutes >= 0
        assert set(entry.before) == {"success", "success_hard", "episodes", "per_task"}
        assert entry.before == {name: history[i].after.get(name, entry.before[name]) for name in entry.before}

    pruned = made[1].manifest
    assert pruned.towers["decoder"].layers[1] == LayerSpec(2, 2, 32, 64)
    assert history[1].after["removed"]["layers"][1]["heads"] == 0.5
    assert pruned.parameters == history[1].after["removed"]["parameters"] < made[0].manifest.parameters
    assert {artifact.manifest.dtype for artifact in made[:-1]} == {"bfloat16"}
    last = made[-1].manifest
    assert last.dtype == "int4"
    assert last.quantization is not None
    assert last.quantization.tensors["head.weight"] == 8
    assert last.quantization.tensors["decoder.layers.1.attention.q.weight"] == 4

    # Curves travel along, every stage's under its own name, a row every 50 steps and every iteration.
    curves = {
        name: made[-1].file(name).read_text().splitlines() for name in made[-1].manifest.files if "curves" in name
    }
    assert {name: len(rows) for name, rows in curves.items()} == {"curves/2-sft.jsonl": 1, "curves/3-rl.jsonl": 2}

    # The weights moved where a stage says so, and only there.
    states = [widen(artifact_io.load_policy(artifact)).state_dict() for artifact in made]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if "decoder.layers" not in name)
    assert not torch.equal(states[2]["vision.position"], states[1]["vision.position"])
    assert torch.equal(states[3]["vision.position"], states[2]["vision.position"])  # rl leaves the eyes alone
    assert not torch.equal(states[3]["head.weight"], states[2]["head.weight"])
    assert (states[4]["head.weight"] - states[3]["head.weight"]).abs().max() < 0.01 * states[3][
        "head.weight"
    ].abs().max()

    # The goldens are the first artifact's observations with this artifact's answers.
    before, after = (artifact_io.read_observations(made[i].file("golden.npz")) for i in (0, -1))
    assert before.keys() == after.keys() == {"image.corner4", "state", "instructions", "ids"}
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    with np.load(made[-1].file("golden.npz")) as golden:
        again = artifact_io.golden(artifact_io.load_policy(made[-1]), after)
        np.testing.assert_allclose(again["logits"], golden["logits"], atol=1e-5)


def test_new_is_reproducible_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerSpec(1, 1, 32, 32)
    small = {"vision": TowerSpec(32, (layer,)), "decoder": TowerSpec(32, (layer,) * 3)}
    monkeypatch.setattr(reference, "towers", lambda: small)
    monkeypatch.setattr(reference, "GOLDEN_SCENES", 1)
    monkeypatch.setattr(
        reference, "TASKS", {name: TASKS[name] for name in ("faucet-open-v3", "drawer-close-v3/shared")}
    )
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        reference.create_reference(tmp_path / name, seed)
    a, b, c = (artifacts.load(tmp_path / name) for name in "abc")
    assert a.manifest == b.manifest  # the hash of every file
    assert c.manifest.files[artifact_folder.WEIGHTS] != a.manifest.files[artifact_folder.WEIGHTS]
    assert [(entry.stage, entry.config, entry.parent) for entry in a.manifest.history] == [("new", {"seed": 1}, None)]
    with np.load(a.file("golden.npz")) as golden:
        assert golden["image.corner4"].shape == (4, 96, 96, 3)
        assert golden["instructions"].tolist() == ["open the faucet"] * 2 + ["close the drawer"] * 2
        assert golden["actions"].shape == (4, 5, 4)


def test_reference_policy_has_the_promised_size() -> None:
    """8 to 12 million parameters, at least 85 % of them in the decoder."""
    with torch.device("meta"):
        policy = TinyPolicy(reference.policy_spec(), reference.towers())
    decoder = sum(p.numel() for p in policy.decoder.parameters())
    assert 8e6 <= weights.count_parameters(policy) <= 12e6
    assert decoder >= 0.85 * weights.count_parameters(policy)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a stage begins to work."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("work began before the refusal")

    monkeypatch.setattr(simulation.Simulation, "evaluate", refuse)
    for module, names in (
        (simulation, ("Rollouts", "demonstrations")),
        (sft_stage, ("sft",)),
        (rl, ("ppo",)),
        (prune.pruning, ("prune",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)


def test_existing_output_is_refused_before_any_work(no_work: None, pupil_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    stages: list[tuple[Any, Any]] = [
        (sft_stage.run_sft, SFTConfig()),
        (prune.run_prune, PruneConfig(0.75)),
        (rl.run_rl, PPOConfig()),
        (quantize.run_quantize, QuantizeConfig()),
    ]
    for run, config in stages:
        with pytest.raises(UserError, match=r"expected a new output, found .*out already there"):
            run(pupil_artifact, tmp_path / "out", config, QUIET)
    with pytest.raises(UserError, match="expected a new output"):
        reference.create_reference(tmp_path / "out")
    with pytest.raises(UserError, match="expected a new output"):
        compress(pupil_artifact, tmp_path / "out", {"prune": PruneConfig(0.75)}, QUIET)
    assert listing(tmp_path) == ["out"]


def test_what_cannot_be_done_is_refused_before_any_work(
    no_work: None,
    pupil_artifact: Path,
    tiny_artifact: Path,
    tiny_int4_artifact: Path,
    toy_artifact: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"prune\.tower decoder, .*found expert"):
        prune.run_prune(tiny_artifact, out, PruneConfig(tower="expert"), QUIET)
    with pytest.raises(UserError, match=r"expected --hints, .*with an official checkpoint only"):
        prune.run_prune(tiny_artifact, out, PruneConfig(0.75), QUIET, Flags(unnorm_key="bridge"))
    with pytest.raises(UserError, match=r"quantize\.exempt"):
        quantize.run_quantize(pupil_artifact, out, QuantizeConfig(exempt=("heads.weight",)), QUIET)
    with pytest.raises(UserError, match="expected an unquantized artifact, found int4"):
        quantize.run_quantize(tiny_int4_artifact, out, QuantizeConfig(), QUIET)
    with pytest.raises(UserError, match="expected trainable weights"):
        sft_stage.run_sft(toy_artifact, out, SFTConfig(), QUIET)
    with pytest.raises(UserError, match=r"expected an artifact folder at .*nowhere"):
        sft_stage.run_sft(tmp_path / "nowhere", out, SFTConfig(), QUIET)
    assert listing(tmp_path) == []


def test_state_of_another_configuration_is_refused_and_kept(pupil_artifact: Path, tmp_path: Path) -> None:
    config = SFTConfig(steps=7, demonstrations=1)
    left = RunState(tmp_path / ".out.run")
    left.open("sft", artifacts.load(pupil_artifact).digest, config)
    left.save(3)
    for name, other in (("sft", SFTConfig(steps=8, demonstrations=1)), ("quantize", QuantizeConfig())):
        with pytest.raises(UserError, match=r"expected to go on with the same stage.*\.out\.run.* remove it"):
            runner(name)(pupil_artifact, tmp_path / "out", other, QUIET)
    assert listing(tmp_path) == [".out.run"]
    again = RunState(tmp_path / ".out.run")
    again.open("sft", artifacts.load(pupil_artifact).digest, config)
    assert (again.load() or {})["step"] == 3


def test_rl_says_that_it_may_play_demonstrations(
    quick: None, pupil_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(simulation, "status", lambda text, *_: nullcontext(shown.append(text)))
    monkeypatch.setattr(rl, "ppo", lambda *_: None)
    rl.run_rl(pupil_artifact, tmp_path / "rl", PPOConfig(iterations=1, demonstrations=1), QUIET)
    assert shown == ["playing demonstrations, unless they are in the cache"]


def test_interrupted_stage_goes_on_where_it_was(
    quick: None, pupil_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "LOG_EVERY", 10)
    config = SFTConfig(steps=40, batch=8, demonstrations=1)
    seen: list[int] = []

    def bar(stop_at: int) -> Callable:
        @contextmanager
        def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int, str], None]]:
            def progress(step: int, text: str) -> None:
                seen.append(step)
                if step == stop_at:
                    raise KeyboardInterrupt

            yield progress

        return progress_bar

    def interrupted(out: Path, stop_at: int, message: str) -> None:
        monkeypatch.setattr(sft_stage, "progress", bar(stop_at))
        with pytest.raises(Interrupted, match=message):
            sft_stage.run_sft(pupil_artifact, out, config, QUIET)

    interrupted(tmp_path / "early", 0, "the same command starts it again")
    assert listing(tmp_path) == []  # no step was done, so nothing is left
    interrupted(tmp_path / "out", 30, "the same command resumes at step 30 of sft")
    assert listing(tmp_path) == [".out.run"]
    seen.clear()
    monkeypatch.setattr(sft_stage, "progress", bar(99))
    sft_stage.run_sft(pupil_artifact, tmp_path / "out", config, QUIET)
    assert seen == list(range(30, 41))
    assert listing(tmp_path) == ["out"]
    rows = artifacts.load(tmp_path / "out").file("curves/1-sft.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [10, 20, 30, 40]


def test_compress_keeps_finished_stages_and_refuses_those_of_another_recipe(
    quick: None, pupil_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[tuple[str, Path]] = []
    monkeypatch.setattr("rlrc.exporters.export.export", lambda a, out: exported.append((a.path.name, out)))
    out, folder = tmp_path / "out", tmp_path / "out.stages"
    recipe = {"prune": PruneConfig(0.75, "random"), "quantize": QuantizeConfig(search=False)}
    compress(pupil_artifact, out, recipe, QUIET)
    assert listing(folder) == ["prune", "quantize"]
    assert exported == [("quantize", out)]
    pruned = artifacts.load(folder / "prune").digest

    # The same again keeps both; without the second, only that is made anew; another setting of the first is refused.
    made = (folder / "quantize" / "manifest.json").stat().st_mtime_ns
    compress(pupil_artifact, out, recipe, QUIET)
    assert (folder / "quantize" / "manifest.json").stat().st_mtime_ns == made
    shutil.rmtree(folder / "quantize")
    compress(pupil_artifact, out, recipe, QUIET)
    assert artifacts.load(folder / "prune").digest == pruned
    assert artifacts.load(folder / "quantize").manifest.history[-1].parent == pruned
    assert len(exported) == 3
    for other in (
        recipe | {"prune": PruneConfig(0.5, "random")},
        recipe | {"quantize": QuantizeConfig()},
        {"quantize": recipe["quantize"]},  # no longer of the pruned policy
    ):
        with pytest.raises(UserError, match=r"out.stages/(prune|quantize) to be stage .* found another one; remove it"):
            compress(pupil_artifact, out, other, QUIET)
    assert listing(folder) == ["prune", "quantize"]
    assert len(exported) == 3


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 0}, {"evaluate": -1}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"expected --{next(iter(options))} >= "):
        StageOptions(**options)
