"""Settings that nobody gave: by family, size and what is trained; shown, recorded, and overridden by what is given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_training_data import record

from families import DATA, flags, source_of
from rlrc import artifact as artifacts
from rlrc.compressor.cli.compress import compress
from rlrc.compressor.models.families import FAMILIES
from rlrc.compressor.rl.config import PPOConfig, PPOOptions
from rlrc.compressor.stages import memory, recipe, sft
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import defaults, run_state
from rlrc.compressor.training.config import SFTConfig, SFTOptions
from rlrc.compressor.training.distill import DistillConfig, DistillOptions
from rlrc.errors import UserError
from rlrc.runtime.cli import main

QUIET = StageOptions(evaluate=0, workers=1, threads=1)
SMALL, BIG = 450_000_000, 7_500_000_000


def chosen(options: Any, family: str, parameters: int) -> dict[str, Any]:
    return {name: setting.value for name, setting in defaults.complete(options, family, parameters)[1].items()}


@pytest.mark.parametrize(
    ("family", "parameters", "lora", "expected"),
    [
        ("openvla", BIG, None, [200_000, 16, 5e-4, 0, "linear", 0.0, 0.01, 32]),
        ("openvla", BIG, 0, [200_000, 32, 2e-5, 0, "linear", 0.0, 0.0]),
        ("openvla", SMALL, None, [200_000, 32, 2e-5, 0, "linear", 0.0, 0.0, 0]),
        ("openvla-oft", BIG, None, [150_000, 8, 5e-4, 0, "linear", 0.3333, 0.01, 32]),
        ("openvla-oft", 1_000_000_000, None, [150_000, 8, 2e-5, 0, "linear", 0.3333, 0.0, 0]),
        ("pi0", BIG, None, [30_000, 32, 2.5e-5, 1000, "cosine", 1e-10, 0]),
        ("pi0", BIG, 16, [30_000, 32, 2.5e-5, 1000, "cosine", 1e-10]),
        ("pi05", BIG, None, [20_000, 32, 2.5e-5, 1000, "cosine", 1e-10, 0]),
        ("smolvla", SMALL, None, [20_000, 64, 1e-4, 666, "cosine", 1e-10, 0]),
        ("smolvla", SMALL, 64, [20_000, 64, 1e-3, 666, "cosine", 1e-10]),
        ("act", SMALL, None, [100_000, 8, 1e-5, 0, "linear", 0.0, 1e-4, 0]),
    ],
)
def test_fine_tuning_by_hand(family: str, parameters: int, lora: int | None, expected: list[Any]) -> None:
    """Steps, batch, rate, warm-up, schedule, its decay if it is linear, weight decay, and LoRA if it was not given."""
    assert list(chosen(SFTOptions(lora=lora), family, parameters).values()) == expected
    distilled = DistillOptions(lora=lora, teacher="TEACHER")
    assert list(chosen(distilled, family, parameters).values()) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("openvla", [80, 5e-6, 3e-3, 16]),
        ("openvla-oft", [40, 5e-6, 3e-3, 8]),
        ("pi0", [128, 1e-5, 1e-4, 32]),
        ("pi05", [128, 5e-6, 1e-4, 32]),
        ("smolvla", [128, 1e-5, 1e-4, 64]),
        ("act", [256, 1e-5, 1e-3, 8]),
        ("tiny", [256, 1e-4, 1e-3, 128]),
    ],
)
def test_reinforcement_learning_by_hand(family: str, expected: list[Any]) -> None:
    """Decisions of a step, rate, the critic's rate, demonstrations of a step."""
    assert list(chosen(PPOOptions(), family, BIG).values()) == expected


def test_every_family_has_complete_settings_with_a_source() -> None:
    assert set(defaults.table()) | {"tiny"} == set(FAMILIES)
    wanted = {"steps", "batch", "rate", "warmup", "schedule", "weight_decay"}
    for family, settings in defaults.table().items():
        for part in (settings.lora, settings.all):
            merged = settings.sft | part
            assert wanted <= set(merged), family
            assert ("decay" in merged) == (merged["schedule"].value == "linear"), family
            for setting in (*merged.values(), *settings.rl.values()):
                assert "/" in setting.source or "rlrc" in setting.source, (family, setting)
        assert set(settings.rl) == {"rate", "value_rate", "minibatch", "behaviour_batch"}
        names = {entry.name for entry in dataclasses.fields(SFTOptions)} | {"precision"}
        assert set(settings.sft) | set(settings.lora) | set(settings.all) <= names


def test_the_reference_policy_is_trained_as_before() -> None:
    """Also by the built-in recipes, whose tables leave out what was the default."""
    former = {"steps": 2000, "batch": 128, "rate": 8e-4, "warmup": 100, "schedule": "linear", "decay": 0.45}
    former |= {"weight_decay": 0.02, "lora": 0}
    assert chosen(SFTOptions(), "tiny", BIG) == former
    for options, complete in ((SFTOptions(), SFTConfig()), (PPOOptions(), PPOConfig())):
        assert defaults.complete(options, "tiny", SMALL)[0] == complete
    distilled, _ = defaults.complete(recipe.load("distill")["distill"], "tiny", SMALL)
    assert distilled == DistillConfig(
        steps=1100, rate=1e-3, demonstrations=120, dagger_rounds=5, dagger_episodes=260, dagger_end=0.7
    )
    assert list(dataclasses.asdict(distilled)) == list(dataclasses.asdict(DistillOptions()))


def test_what_is_given_wins() -> None:
    given: dict[str, Any] = {
        "steps": 50,
        "batch": 4,
        "rate": 3e-3,
        "warmup": 1,
        "schedule": "cosine",
        "weight_decay": 0.5,
        "lora": 0,
    }
    config, left = defaults.complete(SFTOptions(**given, held_out=0.1), "openvla", BIG)
    assert left == {}
    assert {name: getattr(config, name) for name in given} == given
    assert config.held_out == 0.1
    config, left = defaults.complete(SFTOptions(lora=0), "openvla", BIG)
    assert (config.lora, config.rate, "lora" in left) == (0, 2e-5, False)
    assert defaults.complete(config, "act", SMALL) == (config, {})


def test_a_shorter_run_warms_up_for_a_shorter_time() -> None:
    """As in LeRobot: 3000 of 30,000 steps need 100 of 1000."""
    assert chosen(SFTOptions(steps=3000), "pi0", BIG)["warmup"] == 100
    assert chosen(SFTOptions(steps=60_000), "pi0", BIG)["warmup"] == 1000


def test_a_default_that_does_not_go_with_what_is_given_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected sft\.accumulate to divide the batch of 8, found 3; change either"):
        defaults.complete(SFTOptions(accumulate=3), "act", SMALL)
    with pytest.raises(UserError, match=r"expected sft\.dagger_rounds to fall on different steps, found 3000"):
        defaults.complete(SFTOptions(dagger_rounds=3000), "tiny", SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {name: str(record(folder / name, source_of(name).spec)) for name in ("act", "openvla")}


def test_shown_before_the_start_and_kept_in_the_history(
    data: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large OpenVLA trains adapters; stdout stays JSON."""
    monkeypatch.setattr(defaults, "LARGE", 1000)
    trained: list[bool] = []
    real = memory.of_training
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "of_training", lambda *given: (trained.append(given[1].lora > 0), real(*given))[1])
    known = flags("openvla")
    arguments = [
        "--hints",
        str(known.hints),
        "--tokenizer",
        str(known.tokenizer),
        "--unnorm-key",
        str(known.unnorm_key),
    ]
    arguments += ["--steps", "1", "--batch", "2", "--threads", "1", "--evaluate", "0", "--json"]
    out = tmp_path / "out"
    assert main(["sft", str(DATA / "openvla/checkpoint"), str(out), "--data", data["openvla"], *arguments]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["stage"] == "sft"
    source = "openvla/openvla vla-scripts/finetune.py: learning_rate"
    assert f"sft default: rate 0.0005 ({source})" in printed.err.splitlines()
    assert "default: steps" not in printed.err
    entry = artifacts.load(out).manifest.history[-1]
    assert (entry.config["rate"], entry.config["lora"], entry.config["steps"]) == (5e-4, 32, 1)
    assert entry.after["defaults"]["rate"] == source
    assert set(entry.after["defaults"]) == {"rate", "warmup", "schedule", "decay", "weight_decay", "lora", "precision"}
    assert trained == [True]


def test_act_is_trained_in_float32_unless_told_otherwise(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where bfloat16 is faster."""
    monkeypatch.setattr(run_state.precision, "pick_for_training", lambda device: "bfloat16")
    options = SFTOptions(steps=1, batch=2, data=data["act"])
    for name, wanted in (("float32", QUIET), ("bfloat16", dataclasses.replace(QUIET, precision="bfloat16"))):
        manifest = sft.run_sft(DATA / "act/checkpoint", tmp_path / name, options, wanted, flags("act"))
        assert set(manifest.history[-1].precision.values()) == {name}
        assert ("precision" in manifest.history[-1].after["defaults"]) == (name == "float32")


def test_a_finished_stage_of_a_recipe_is_kept(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Path] = []
    monkeypatch.setattr("rlrc.exporters.export.export", lambda artifact, out: exported.append(artifact.path))
    settings = {"sft": SFTOptions(steps=1, batch=2, data=data["act"])}
    for _ in range(2):
        compress(DATA / "act/checkpoint", tmp_path / "out", settings, QUIET, flags("act"))
    assert exported == [tmp_path / "out.stages/sft"] * 2


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """Of the reference policy it goes on; where the defaults are others now, the refusal names them."""
    begun = run_state.RunState(tmp_path / "run")
    begun.open("sft", "parent", SFTConfig())  # the earlier defaults of every family
    begun.save(3)
    again = run_state.RunState(tmp_path / "run")
    again.open("sft", "parent", defaults.complete(SFTOptions(), "tiny", SMALL)[0])
    assert again.saved == 3
    now = defaults.complete(SFTOptions(steps=2000, batch=128, schedule="linear"), "act", SMALL)[0]
    differences = (
        "decay 0.45 instead of 0.0, rate 0.0008 instead of 1e-05, warmup 100 instead of 0, "
        "weight_decay 0.02 instead of 0.0001; give what it began with, or remove it to start anew"
    )
    with pytest.raises(UserError, match=differences):
        run_state.RunState(tmp_path / "run").open("sft", "parent", now)
    with pytest.raises(UserError, match="found another: stage sft instead of rl; give"):
        run_state.RunState(tmp_path / "run").open("rl", "parent", PPOConfig())
