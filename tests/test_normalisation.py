"""What a base checkpoint takes from the data it is trained on, as LeRobot's training does: statistics and widths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from families import DATA, flags
from rlrc import artifact as artifacts
from rlrc.artifact import NormStats
from rlrc.compressor.cli.compress import compress
from rlrc.compressor.stages import sft
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training.config import SFTConfig
from rlrc.datasets.meta import Feature
from rlrc.datasets.writer import Recording, write
from rlrc.errors import UserError
from rlrc.runtime.cli import main

QUIET = StageOptions(evaluate=0, workers=1, threads=1)
SIZES = {"act": (96, 128), "pi0": (20, 30), "pi05": (20, 30), "smolvla": (20, 30)}  # ACT resizes nothing
STATE, ACTION = "observation.state", "action"


def base(family: str, path: Path, width: int | None = 32) -> Path:
    """The golden as a base is published: modes without statistics, and state and action of the widest that it takes."""
    folder = shutil.copytree(DATA / family / "checkpoint", path / f"{family}-base")
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        values = json.loads((folder / file).read_text())
        for step in values["steps"]:
            step.pop("state_file", None)
        (folder / file).write_text(json.dumps(values))
    config = json.loads((folder / "config.json").read_text())
    if width is not None:
        config["input_features"][STATE]["shape"] = [width]
        config["output_features"][ACTION]["shape"] = [width]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def record(path: Path, size: tuple[int, int], state: int, names: tuple[str, ...]) -> Path:
    """Three episodes of random pictures, states and actions, far from zero and not of one scale."""
    random = np.random.default_rng(5)
    features = {
        "observation.images.top": Feature("image", (*size, 3)),
        STATE: Feature("float32", (state,)),
        ACTION: Feature("float32", (len(names),), names),
    }

    def frames() -> Iterator[dict[str, Any]]:
        for _ in range(8):
            yield {
                "observation.images.top": random.integers(0, 256, (*size, 3), np.uint8),
                STATE: (3 + np.arange(1, state + 1) * random.standard_normal(state)).astype(np.float32),
                ACTION: (40 + random.uniform(-5, 9, len(names))).astype(np.float32),
            }

    write(path, 10, features, (Recording("open the drawer", frames()) for _ in range(3)))
    return path


def columns(data: Path) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet as pq

    (file,) = data.glob("data/*/*.parquet")
    table = pq.read_table(file)
    state, action = (np.array(table[name].to_pylist(), np.float64) for name in (STATE, ACTION))
    return state, action


def train(folder: Path, out: Path, data: Path, family: str, **config: Any) -> artifacts.Manifest:
    options = SFTConfig(steps=1, batch=2, warmup=0, data=str(data), **config)
    return sft.run_sft(folder, out, options, QUIET, flags(family))


NAMES = ("shoulder.pos", "elbow.pos", "wrist.pos", "gripper.pos")


@pytest.mark.parametrize(("family", "state"), [("smolvla", 5), ("pi0", 4), ("pi05", 6)])
def test_a_base_takes_the_data_sets_statistics_and_widths(
    family: str, state: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    data = record(tmp_path / "data", SIZES[family], state, NAMES)
    folder, out = base(family, tmp_path), tmp_path / "out"
    # What sft will do, data inspect says beforehand.
    known = flags(family)
    given = ["--hints", str(known.hints), "--tokenizer", str(known.tokenizer)]
    assert main(["data", "inspect", str(data), "--policy", str(folder), *given]) == 0

    manifest = train(folder, out, data, family)
    felt, done = columns(data)
    policy = manifest.policy
    assert policy.state is not None
    assert policy.action.names == NAMES
    assert policy.action.meaning == ("absolute", "absolute", "absolute", "gripper")
    assert policy.flow is not None
    assert (len(policy.state.names), policy.flow.width) == (state, 32)
    assert policy.state.width == (None if family == "pi05" else 32)
    for norm, values in ((policy.state.norm, felt), (policy.action.norm, done)):
        center, scale = values.mean(0), values.std(0)
        if family == "pi05":  # its mode is QUANTILES
            low, high = np.quantile(values, [0.01, 0.99], axis=0)
            center, scale = (low + high) / 2, (high - low) / 2
        np.testing.assert_allclose(norm.center, center, rtol=1e-4)
        np.testing.assert_allclose(norm.scale, scale, rtol=1e-4)
    (how,) = manifest.history[-1].after["normalisation"]["action"]
    assert how["mode"] == ("QUANTILES" if family == "pi05" else "MEAN_STD")
    assert how["origin"].endswith(f"action in {data}/meta/stats.json")
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert f"of action in {data}/meta/stats.json" in capsys.readouterr().out
    with np.load(out / "golden.npz") as golden:
        assert golden["state"].shape[1] == state
        assert golden["actions"].shape[2] == len(NAMES)
        # In the data's units: about their mean, from a policy that was hardly trained.
        assert abs(golden["actions"].mean() - 42) < 12


def unlisted(folder: Path) -> Path:
    """As lerobot/pi0_base and pi05_base are published: the normalizers list no features, config.json has no modes."""
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        values = json.loads((folder / file).read_text())
        for step in values["steps"]:
            step["config"].update({"features": {}} if "normalizer" in step["registry_name"] else {})
        (folder / file).write_text(json.dumps(values))
    config = json.loads((folder / "config.json").read_text())
    config.pop("normalization_mapping")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["pi05", "act"])
def test_a_base_that_lists_no_features_takes_the_data_sets_statistics(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = NAMES if family != "act" else tuple(f"m{i}" for i in range(6))
    data = record(tmp_path / "data", SIZES[family], 6, names)
    folder = unlisted(base(family, tmp_path, 32 if family != "act" else None))
    hints = ["--hints", str(flags(family).hints)]
    assert main(["inspect", str(folder), *hints]) == 0
    assert f"next: rlrc sft {folder} OUT --data FOLDER" in capsys.readouterr().out
    assert main(["quantize", str(folder), str(tmp_path / "out"), *hints]) == 2
    assert f"or use those of your data: rlrc sft {folder} OUT --data FOLDER" in capsys.readouterr().err
    policy = train(folder, tmp_path / "out", data, family).policy
    felt, done = columns(data)
    assert policy.state is not None
    for norm, values in ((policy.state.norm, felt), (policy.action.norm, done)):
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        center = (low + high) / 2 if family == "pi05" else values.mean(0)
        np.testing.assert_allclose(norm.center, center, rtol=1e-4)


def test_act_takes_imagenets_for_pictures_and_its_own_widths(tmp_path: Path) -> None:
    folder = base("act", tmp_path, width=None)
    six = tuple(f"m{i}" for i in range(6))
    data = record(tmp_path / "data", SIZES["act"], 6, six)
    manifest = train(folder, tmp_path / "out", data, "act")
    (camera,) = manifest.policy.cameras
    assert camera.mean == pytest.approx((0.485, 0.456, 0.406))
    assert camera.std == pytest.approx((0.229, 0.224, 0.225))
    assert manifest.policy.state is not None
    np.testing.assert_allclose(manifest.policy.state.norm.center, columns(data)[0].mean(0), rtol=1e-4)
    other = record(tmp_path / "other", SIZES["act"], 5, six)
    with pytest.raises(UserError, match=r"expected observation.state of 6 numbers in .*, found float32 \(5,\)"):
        train(folder, tmp_path / "out2", other, "act")
    assert not (tmp_path / "out2").exists()


def test_statistics_of_the_policy_are_kept_unless_the_datas_are_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = DATA / "smolvla/checkpoint"
    six = tuple(f"m{i}" for i in range(6))
    data = record(tmp_path / "data", SIZES["smolvla"], 6, six)
    kept = train(folder, tmp_path / "kept", data, "smolvla")
    assert "the policy's own statistics of state, action are kept; --statistics data takes" in capsys.readouterr().err
    tensors = load_file(next(folder.glob("policy_post*.safetensors")))
    assert kept.policy.action.norm.center == tuple(tensors["action.mean"].double().tolist())
    assert kept.policy.action.names[0] == "joint_0"
    assert "normalisation" not in kept.history[-1].after

    # Of an artifact too, and then with other widths.
    narrow = record(tmp_path / "narrow", SIZES["smolvla"], 3, NAMES)
    config = SFTConfig(steps=1, batch=2, warmup=0, data=str(narrow))
    with pytest.raises(UserError, match=r"expected observation.state of shape \(6,\)"):
        sft.run_sft(tmp_path / "kept", tmp_path / "refused", config, QUIET)
    taken = sft.run_sft(tmp_path / "kept", tmp_path / "taken", replace(config, statistics="data"), QUIET)
    np.testing.assert_allclose(taken.policy.action.norm.center, columns(narrow)[1].mean(0), rtol=1e-4)
    assert taken.policy.state is not None
    assert len(taken.policy.state.names) == 3
    with np.load(tmp_path / "taken/golden.npz") as golden:
        assert golden["state"].shape[1] == 3


def test_only_what_is_missing_is_taken(tmp_path: Path) -> None:
    folder = base("smolvla", tmp_path, width=None)
    values = json.loads((folder / "policy_postprocessor.json").read_text())
    values["steps"][0]["state_file"] = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    (folder / "policy_postprocessor.json").write_text(json.dumps(values))
    data = record(tmp_path / "data", SIZES["smolvla"], 4, tuple(f"m{i}" for i in range(6)))
    manifest = train(folder, tmp_path / "out", data, "smolvla")
    tensors = load_file(next(folder.glob("policy_post*.safetensors")))
    assert manifest.policy.action.norm.center == tuple(tensors["action.mean"].double().tolist())
    assert manifest.policy.state is not None
    np.testing.assert_allclose(manifest.policy.state.norm.center, columns(data)[0].mean(0), rtol=1e-4)
    assert set(manifest.history[-1].after["normalisation"]) == {"image.top", "state", "action"}


def test_groups_of_other_data_sets_are_not_the_datas(tmp_path: Path) -> None:
    """As the published smolvla_base: sft needs no key; with one, that group's statistics are kept."""
    folder = base("smolvla", tmp_path, width=None)
    for file, name in (("policy_preprocessor.json", "pre"), ("policy_postprocessor.json", "post")):
        stored = load_file(next(folder.glob(f"policy_{name}*.safetensors")))
        save_file({f"so100.buffer.{key}": value for key, value in stored.items()}, folder / f"{name}.safetensors")
        values = json.loads((folder / file).read_text())
        step = next(one for one in values["steps"] if "normalizer" in one["registry_name"])
        step["state_file"] = f"{name}.safetensors"
        (folder / file).write_text(json.dumps(values))
    data = record(tmp_path / "data", SIZES["smolvla"], 6, tuple(f"m{i}" for i in range(6)))
    taken = train(folder, tmp_path / "taken", data, "smolvla")
    np.testing.assert_allclose(taken.policy.action.norm.center, columns(data)[1].mean(0), rtol=1e-4)
    config = SFTConfig(steps=1, batch=2, warmup=0, data=str(data))
    known = replace(flags("smolvla"), unnorm_key="so100")
    kept = sft.run_sft(folder, tmp_path / "kept", config, QUIET, known)
    assert kept.history[0].after["normalisation"]["action"][0]["group"] == "so100"
    assert abs(kept.policy.action.norm.center[0]) < 5


def test_quantiles_that_the_data_set_does_not_state_are_those_of_its_rows(tmp_path: Path) -> None:
    """As data sets converted from v2.1; LeRobot refuses there."""
    data = record(tmp_path / "data", SIZES["pi05"], 4, NAMES)
    stats = json.loads((data / "meta/stats.json").read_text())
    for name in (STATE, ACTION):
        del stats[name]["q01"], stats[name]["q99"]
    (data / "meta/stats.json").write_text(json.dumps(stats))
    manifest = train(base("pi05", tmp_path), tmp_path / "out", data, "pi05")
    low, high = np.quantile(columns(data)[1], [0.01, 0.99], axis=0)
    np.testing.assert_allclose(manifest.policy.action.norm.center, (low + high) / 2, rtol=1e-5)
    assert manifest.history[-1].after["normalisation"]["action"][0]["origin"].endswith(f"in the rows of {data}")


@pytest.mark.parametrize(
    ("state", "names", "change", "message"),
    [
        (33, NAMES, {}, r"expected observation.state of at most 32 numbers in .*, found float32 \(33,\)"),
        (
            3,
            tuple(f"m{i}" for i in range(40)),
            {},
            r"expected action of at most 32 numbers in .*, found float32 \(40,\)",
        ),
        (3, NAMES, {"mean": [1.0]}, r"expected 4 finite .* as mean of action in .*, found 1: \[1.0\]"),
        (3, NAMES, {"std": [1.0, -1.0, 1.0, 1.0]}, "expected std of at least 0 in the statistics of action"),
    ],
)
def test_data_that_a_base_cannot_take(
    state: int, names: tuple[str, ...], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = record(tmp_path / "data", SIZES["smolvla"], state, names)
    stats = json.loads((data / "meta/stats.json").read_text())
    stats[ACTION] |= change
    (data / "meta/stats.json").write_text(json.dumps(stats))
    with pytest.raises(UserError, match=message) as caught:
        train(base("smolvla", tmp_path), tmp_path / "out", data, "smolvla")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, known = base("act", tmp_path, width=None), flags("act")
    given = ["--hints", str(known.hints)]
    assert main(["sft", str(folder), str(tmp_path / "out"), *given]) == 2
    assert "found none; give --data FOLDER" in capsys.readouterr().err
    data = record(tmp_path / "data", SIZES["act"], 6, tuple(f"m{i}" for i in range(6)))
    trained = train(folder, tmp_path / "out", data, "act")
    assert trained.policy.state is not None
    # The base's files have no place for what was learned.
    assert main(["write-back", str(tmp_path / "out"), str(tmp_path / "back"), "--like", str(folder), *given]) == 2
    assert "found other statistics of image.top, state, action in the artifact" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_base_whose_modes_are_identity_takes_the_widths(tmp_path: Path) -> None:
    folder = base("pi0", tmp_path)
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        values = json.loads((folder / file).read_text())
        for step in values["steps"]:
            if "norm_map" in step["config"]:
                step["config"]["norm_map"] = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")
        (folder / file).write_text(json.dumps(values))
    manifest = train(folder, tmp_path / "out", record(tmp_path / "data", SIZES["pi0"], 5, NAMES), "pi0")
    assert manifest.policy.action.norm == NormStats((0.0,) * 4, (1.0,) * 4)
    assert manifest.policy.action.names == NAMES
    assert manifest.policy.state is not None
    assert (len(manifest.policy.state.names), manifest.policy.state.width) == (5, 32)


def test_a_recipe_goes_on_after_the_fine_tuning_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlrc.exporters.export.export", lambda artifact, out: exported.append(artifact.path))
    exported: list[Path] = []
    data = record(tmp_path / "data", SIZES["act"], 6, tuple(f"m{i}" for i in range(6)))
    recipe = {"sft": SFTConfig(steps=1, batch=2, warmup=0, data=str(data))}
    for _ in range(2):
        compress(base_once(tmp_path), tmp_path / "out", recipe, QUIET, flags("act"))
    assert exported == [tmp_path / "out.stages/sft"] * 2


def base_once(path: Path) -> Path:
    return path / "act-base" if (path / "act-base").exists() else base("act", path, width=None)
