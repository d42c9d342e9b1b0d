"""LeRobot's processor pipelines: statistics that are missing or stored by data set, settings of steps, and their order.

Every folder is a golden one, changed. The commands must give the reference's actions, or refuse in one line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed_folders import (
    NORMALIZER,
    POST,
    PRE,
    UNNORMALIZER,
    Change,
    actions,
    copied,
    edited,
    expected,
    given,
    infer,
    layout,
    setting,
    spec,
    state_file,
    step,
    without,
)
from safetensors.torch import load_file, save_file

from families import DATA
from rlrc.artifact import NormStats
from rlrc.errors import UserError
from rlrc.runtime.cli import main
from rlrc.runtime.inference.preprocess import normalise


def renamed(groups: dict[str, float]) -> Change:
    """Statistics under the names of data sets, as LeRobot migrated smolvla_base; deviations times the number."""

    def run(folder: Path) -> None:
        for file, name in ((PRE, NORMALIZER), (POST, UNNORMALIZER)):
            stored = load_file(path := state_file(folder, file, name))
            found = {
                f"{group}.{k}": v * times if k.endswith("std") else v.clone()
                for group, times in groups.items()
                for k, v in stored.items()
            }
            save_file(found, path)

    return run


def among_weights(groups: dict[str, float]) -> Change:
    """The same among the weights, as LeRobot before 0.4 had them; the pipelines have no statistics."""

    def run(folder: Path) -> None:
        stored = load_file(state_file(folder, PRE, NORMALIZER))
        tensors = load_file(folder / "model.safetensors")
        for key, value in stored.items():
            feature, _, statistic = key.rpartition(".")
            for place in ("normalize_targets", "unnormalize_outputs") if feature == "action" else ("normalize_inputs",):
                for group, times in groups.items():
                    name = f"{place}.{group}_buffer_{feature.replace('.', '_')}.{statistic}"
                    tensors[name] = value * times if statistic == "std" else value.clone()
        save_file(tensors, folder / "model.safetensors")
        for file, name in ((PRE, NORMALIZER), (POST, UNNORMALIZER)):
            edited(file, lambda values, name=name: step(values, name).pop("state_file"))(folder)

    return run


@pytest.mark.parametrize("stored", [renamed, among_weights])
@pytest.mark.parametrize(("family", "names"), [("smolvla", ("so100", "so100-red")), ("pi0", ("aloha", "kitchen_2"))])
def test_statistics_by_data_set(
    family: str,
    names: tuple[str, str],
    stored: Callable[[dict[str, float]], Change],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = {name: f"{name}.buffer" if stored is renamed else name for name in names}
    folder = copied(family, tmp_path, stored({prefix[names[0]]: 1.0, prefix[names[1]]: 2.0}))
    assert infer(folder, family, tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"found only those of the data sets {names[0]}, {names[1]}; choose one with --unnorm-key" in line
    assert not (tmp_path / "act.npz").exists()

    assert infer(folder, family, tmp_path, "--unnorm-key", names[0]) == 0
    np.testing.assert_allclose(actions(tmp_path), expected(family), rtol=0, atol=1e-5)
    wide = spec(folder, family, unnorm_key=names[1]).action.norm
    assert wide.scale == tuple(2 * scale for scale in spec(DATA / family / "checkpoint", family).action.norm.scale)
    assert infer(folder, family, tmp_path, "--unnorm-key", "bridge") == 2
    assert f"expected one of the data sets {names[0]}, {names[1]} of" in capsys.readouterr().err

    assert main(["inspect", str(folder), *given(family)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"action: MEAN_STD, but no statistics: found only those of the data sets {names[0]}, {names[1]}; choose"
        in shown
    )
    assert main(["inspect", str(folder), *given(family), "--unnorm-key", names[1]]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    separator = ".buffer." if stored is renamed else "_buffer_"
    assert f"action: MEAN_STD by mean, std of {names[1]}{separator}action in" in shown


def test_a_key_where_no_statistics_name_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(DATA / "act/checkpoint", "act", tmp_path, "--unnorm-key", "lab") == 2
    assert "expected no --unnorm-key for" in capsys.readouterr().err


def lower(name: str) -> Change:
    def run(folder: Path) -> None:
        file = PRE if name == NORMALIZER else POST
        modes = step(json.loads((folder / file).read_text()), name)["config"]["norm_map"]
        setting(file, name, norm_map={kind.lower(): mode.lower() for kind, mode in modes.items()})(folder)

    return run


def only_mean(folder: Path) -> None:
    path = state_file(folder, POST, UNNORMALIZER)
    save_file({k: v for k, v in load_file(path).items() if k != "action.std"}, path)


def no_statistics(file: str, name: str) -> Change:
    return edited(file, lambda values: step(values, name).pop("state_file"))


def no_mode(file: str, name: str, kind: str) -> Change:
    return edited(file, lambda values: step(values, name)["config"]["norm_map"].pop(kind))


MISSING = {
    "no state file of the unnormalizer": (
        no_statistics(POST, UNNORMALIZER),
        "found no state_file of unnormalizer_proc",
    ),
    "no state file of the normalizer": (no_statistics(PRE, NORMALIZER), "found no state_file of normalizer_processor"),
    "no unnormalizer": (without(POST, UNNORMALIZER), "found no unnormalizer_processor in policy_postprocessor.json"),
    "no normalizer": (without(PRE, NORMALIZER), "found no normalizer_processor in policy_preprocessor.json"),
    "no norm_map": (
        edited(POST, lambda values: step(values, UNNORMALIZER)["config"].pop("norm_map")),
        "kind of feature as norm_map of unnormalizer_processor in policy_postprocessor.json, found None",
    ),
    "empty norm_map": (setting(PRE, NORMALIZER, norm_map={}), "as norm_map of normalizer_processor in .*, found {}"),
    "no mode of the action": (
        no_mode(POST, UNNORMALIZER, "ACTION"),
        "expected a mode for ACTION as norm_map of unnorm",
    ),
    "no mode of the state": (no_mode(PRE, NORMALIZER, "STATE"), "expected a mode for STATE as norm_map of normalizer"),
    "lower case": (lower(UNNORMALIZER), "kinds of features in norm_map of unnormalizer_processor .*, found 'visual'"),
    "lower case inwards": (
        lower(NORMALIZER),
        "kinds of features in norm_map of normalizer_processor .*, found 'visual'",
    ),
    "modes that differ": (
        edited(POST, lambda values: step(values, UNNORMALIZER)["config"]["norm_map"].update(ACTION="IDENTITY")),
        "expected the same modes of normalisation for action .*, found [A-Z_]+ and IDENTITY",
    ),
    "not among the features": (
        setting(PRE, NORMALIZER, features={}),
        "expected statistics of observation.*, found no observation.* among the features of normalizer_processor",
    ),
    "half of the statistics": (only_mean, "finite floating-point numbers as std of action .*, found only "),
}


@pytest.mark.parametrize("family", ["act", "pi0"])
@pytest.mark.parametrize("name", MISSING)
def test_a_mode_without_statistics_is_refused(
    name: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = MISSING[name]
    folder = copied(family, tmp_path, change)
    assert infer(folder, family, tmp_path) == 2
    with pytest.raises(UserError, match=message):
        spec(folder, family)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlrc: error: expected ")
    assert not (tmp_path / "act.npz").exists()


def feature(which: str, kind: str, **values: Any) -> Change:
    def change(config: Any) -> None:
        next(one for one in config[which].values() if one["type"] == kind).update(values)

    return edited("config.json", change)


UNREADABLE = {
    "a kind in lower case": (feature("input_features", "STATE", type="state"), "as the type of observation.state in"),
    "a camera of another kind": (feature("input_features", "VISUAL", type="IMAGE"), "found 'IMAGE'; correct it"),
    "a shape in words": (
        feature("input_features", "STATE", shape="6"),
        "whole numbers up to 1,000,000 as the shape of obs.*'6'",
    ),
    "a negative shape": (
        feature("output_features", "ACTION", shape=[-3]),
        r"shape of action in .*\[-3\]; correct",
    ),
    "another's state file": (
        edited(POST, lambda values: step(values, UNNORMALIZER).update(state_file="../other.safetensors")),
        "a state_file outside of the folder: ../other.safetensors",
    ),
    "a class of its own": (
        edited(PRE, lambda values: values["steps"].append({"class": "my_robot.steps.Flip", "config": {}})),
        "found 'my_robot.steps.Flip'; rlrc runs no code of a checkpoint",
    ),
}


@pytest.mark.parametrize("family", ["act", "pi0"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_not_passed_over(name: str, family: str, tmp_path: Path) -> None:
    """An entry of an unknown kind used to be left out: pi0 then took a state of the default width."""
    change, message = UNREADABLE[name]
    with pytest.raises(UserError, match=message):
        spec(copied(family, tmp_path, change), family)


@pytest.mark.parametrize(("shortest", "longest"), [(0.0, 4.0), (-1.0, 4.0), (5.0, 4.0)])
def test_waves_of_the_time_that_cannot_be(shortest: float, longest: float, tmp_path: Path) -> None:
    change = edited("config.json", lambda values: values.update(min_period=shortest, max_period=longest))
    with pytest.raises(UserError, match=r"expected 0 < min_period <= max_period in config\.json, found"):
        spec(copied("smolvla", tmp_path, change), "smolvla")


def test_pi05_without_processors(tmp_path: Path) -> None:
    """It came with LeRobot 0.4, so it never had another way to keep them."""

    def without_processors(path: Path) -> None:
        for file in (PRE, POST):
            (path / file).unlink()

    folder = copied("pi05", tmp_path, without_processors)
    with pytest.raises(UserError, match=f"expected .*{PRE}, found: No such file"):
        spec(folder, "pi05")


def test_every_command_that_opens_a_folder_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("act", tmp_path, no_statistics(POST, UNNORMALIZER))
    good, out = tmp_path / "good", str(tmp_path / "out")
    assert main(["prune", str(DATA / "act/checkpoint"), str(good), "--lossless"]) == 0
    capsys.readouterr()
    for command in (
        ["prune", str(folder), out, "--lossless"],
        ["quantize", str(folder), out],
        ["sensitivity", str(folder), "--out", out],
        ["distill", str(good), out, "--teacher", str(folder), "--data", str(tmp_path)],
    ):
        assert main(command) == 2, command
        assert "expected statistics of action" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["act-changed", "good"]


def test_identity_needs_no_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def identity(folder: Path) -> None:
        for file, name in ((PRE, NORMALIZER), (POST, UNNORMALIZER)):
            edited(file, lambda v, name=name: step(v, name)["config"]["norm_map"].update(ACTION="IDENTITY"))(folder)
        no_statistics(POST, UNNORMALIZER)(folder)

    folder = copied("act", tmp_path, identity)
    assert infer(folder, "act", tmp_path) == 0
    norm = spec(DATA / "act/checkpoint", "act").action.norm
    np.testing.assert_allclose(actions(tmp_path), normalise(expected("act"), norm), rtol=0, atol=1e-5)
    assert main(["inspect", str(folder)]) == 0
    assert "action: IDENTITY (norm_map of unnormalizer_processor in policy_post" in " ".join(
        capsys.readouterr().out.split()
    )
    # Without the step, and with no mode but IDENTITY anywhere.
    folder = copied("act", tmp_path / "2", identity, without(POST, UNNORMALIZER))
    assert spec(folder, "act").action.norm == NormStats((0.0,) * 6, (1.0,) * 6)


def test_two_normalisers_one_after_the_other(tmp_path: Path) -> None:
    """Each by a part of the golden's statistics: (x - 3 - (mean - 3)) / 4 / (std / 4)."""

    def halves(folder: Path) -> None:
        for file, name in ((PRE, NORMALIZER), (POST, UNNORMALIZER)):
            stored, first, second = load_file(state_file(folder, file, name)), {}, {}
            for key, value in stored.items():
                one = {"mean": 3.0, "std": 4.0}.get(key.rpartition(".")[2])
                if one is not None:
                    first[key] = torch.full_like(value, one)
                    second[key] = (value - 3) / 4 if one == 3.0 else value / 4
            save_file(first, folder / f"{name}-1.safetensors")
            save_file(second, folder / f"{name}-2.safetensors")

            def twice(values: Any, name: str = name, file: str = file) -> None:
                at = values["steps"].index(step(values, name))
                one = {**values["steps"][at], "state_file": f"{name}-1.safetensors"}
                two = {**values["steps"][at], "state_file": f"{name}-2.safetensors"}
                values["steps"][at : at + 1] = [one, two] if file == PRE else [two, one]

            edited(file, twice)(folder)

    folder = copied("act", tmp_path, halves)
    assert infer(folder, "act", tmp_path) == 0
    np.testing.assert_allclose(actions(tmp_path), expected("act"), rtol=0, atol=2e-5)
    assert len(layout(folder, "act").normalisation["state"]) == 2


@pytest.mark.parametrize(
    ("family", "file", "name", "settings", "message"),
    [
        (
            "pi05",
            PRE,
            "pi05_prepare_state_tokenizer_processor_step",
            {"include_state_in_prompt": False},
            "found include_",
        ),
        (
            "pi05",
            PRE,
            "pi05_prepare_state_tokenizer_processor_step",
            {"task_key": "subtask"},
            '"task" as task_key of pi05',
        ),
        (
            "pi05",
            PRE,
            "pi05_prepare_state_tokenizer_processor_step",
            {"max_state_dim": 0},
            "whole number as max_state_dim",
        ),
        ("pi0", PRE, "tokenizer_processor", {"padding_side": "left"}, "\"right\" as padding_side of .*, found 'left'"),
        ("pi0", PRE, "tokenizer_processor", {"task_key": "goal"}, "as task_key of tokenizer_processor"),
        ("pi0", PRE, "tokenizer_processor", {"truncation": "only_second"}, "true or false as truncation of"),
        ("pi0", PRE, "tokenizer_processor", {"padding": 8}, "as padding of tokenizer_processor"),
        ("pi0", PRE, "tokenizer_processor", {"max_length": None}, "a positive whole number as max_length"),
        ("pi0", PRE, "tokenizer_processor", {"add_special_tokens": False}, "found add_special_tokens False"),
        ("smolvla", PRE, "smolvla_new_line_processor", {"separator": "\n\n"}, r"rlrc knows \(none\), found separator"),
        ("smolvla", PRE, "to_batch_processor", {"size": 2}, "found size 2; rlrc does not know its effect"),
        ("act", PRE, "device_processor", {"float_dtype": "bfloat16"}, "as float_dtype of device_processor"),
        (
            "act",
            POST,
            "device_processor",
            {"float_dtype": "float16"},
            "as float_dtype of device_processor in policy_post",
        ),
        ("act", PRE, NORMALIZER, {"clip": 5.0}, "found clip 5.0"),
        ("act", PRE, NORMALIZER, {"eps": -1}, "of at least 0 as eps of"),
        ("act", PRE, NORMALIZER, {"dtype": "float16"}, "as dtype of normalizer_processor"),
        ("act", PRE, NORMALIZER, {"normalize_observation_keys": "all"}, "as normalize_observation_keys of"),
        (
            "act",
            PRE,
            NORMALIZER,
            {"features": {"observation.state": {"type": "TOUCH"}}},
            "as the type of observation.state",
        ),
        ("act", PRE, "rename_observations_processor", {"rename_map": ["a", "b"]}, "as rename_map of"),
        (
            "act",
            PRE,
            "rename_observations_processor",
            {"rename_map": {"observation.state": "felt"}},
            "renames to observ",
        ),
    ],
)
def test_settings_that_change_what_rlrc_cannot(
    family: str, file: str, name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = copied(family, tmp_path, setting(file, name, **settings))
    with pytest.raises(UserError, match=message) as caught:
        spec(folder, family)
    assert "\n" not in str(caught.value)


def test_settings_without_effect_pass(tmp_path: Path) -> None:
    folder = copied(
        "pi0",
        tmp_path,
        setting(PRE, "device_processor", device="cuda:1", float_dtype="float32"),
        setting(PRE, "tokenizer_processor", padding="longest"),
        setting(PRE, "rename_observations_processor", rename_map={"observation.state": "observation.state"}),
        setting(PRE, "relative_actions_processor", exclude_joints=[], action_names=["a"]),
        setting(PRE, NORMALIZER, device="cuda", dtype=None),
    )
    assert spec(folder, "pi0") == spec(DATA / "pi0/checkpoint", "pi0")


def test_settings_that_are_honoured(tmp_path: Path) -> None:
    """Statistics among the settings win over those of the file, and inputs that are left out stay raw."""
    stats = {"observation.state": {"mean": [1.0] * 6, "std": [2.0] * 6}}
    folder = copied(
        "act",
        tmp_path,
        setting(PRE, NORMALIZER, stats=stats, normalize_observation_keys=["observation.state"], eps=0.5),
        setting(PRE, "rename_observations_processor", rename_map={"observation.images.cam": "observation.images.top"}),
    )
    found = layout(folder, "act")
    assert found.spec.state is not None
    assert found.spec.state.norm == NormStats((1.0,) * 6, (2.5,) * 6)
    (camera,) = found.spec.cameras
    assert (camera.name, camera.mean, camera.std) == ("cam", (0.0,) * 3, (1.0,) * 3)
    (how,) = found.normalisation["image.cam"]
    assert (how.mode, how.origin[:33]) == ("IDENTITY", "not in normalize_observation_keys")


def moved(name: str, before: str) -> Change:
    def run(values: Any) -> None:
        values["steps"].remove(one := step(values, name))
        values["steps"].insert(values["steps"].index(step(values, before)), one)

    return edited(PRE, run)


def test_order_of_the_steps(tmp_path: Path) -> None:
    """What edits the text after the tokenizer is read by nothing; a second renaming finds what the first made."""

    def chained(values: Any) -> None:
        one = step(values, "rename_observations_processor")
        one["config"]["rename_map"] = {"observation.images.front": "observation.images.middle"}
        again = {**one, "config": {"rename_map": {"observation.images.middle": "observation.images.top"}}}
        values["steps"].insert(1, again)

    folder = copied(
        "smolvla", tmp_path, moved("tokenizer_processor", "smolvla_new_line_processor"), edited(PRE, chained)
    )
    found = spec(folder, "smolvla")
    assert found.prompt is not None
    assert found.prompt.edits == ()
    assert [camera.name for camera in found.cameras] == ["front"]
    # The prompt of pi0.5 would tell the raw state.
    late = copied("pi05", tmp_path, moved("pi05_prepare_state_tokenizer_processor_step", NORMALIZER))
    with pytest.raises(UserError, match=r"no normalizer_processor in .* before the state is put into the prompt"):
        spec(late, "pi05")


def test_width_of_the_statistics_where_the_config_has_the_padded_one(tmp_path: Path) -> None:
    """What LeRobot fine-tunes from a base keeps the base's [32] in config.json, and normalises as many as there are."""

    def padded(values: Any) -> None:
        values["input_features"]["observation.state"]["shape"] = [32]
        values["output_features"]["action"]["shape"] = [32]

    folder = copied("smolvla", tmp_path, edited("config.json", padded))
    assert spec(folder, "smolvla") == spec(DATA / "smolvla/checkpoint", "smolvla")
    short = copied(
        "smolvla", tmp_path / "2", edited("config.json", lambda v: v["output_features"]["action"].update(shape=[9]))
    )
    with pytest.raises(UserError, match=r"expected 9 finite floating-point numbers as mean of action .*, found 6"):
        spec(short, "smolvla")
