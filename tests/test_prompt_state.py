"""Whether the state in pi0.5's prompt is padded: LeRobot 0.4 pads it, later versions do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_folders import POST, PRE, Change, actions, copied, edited, expected, given, infer, setting, spec, without

from families import DATA, TOKENIZERS
from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.cli import main
from rlrc.runtime.inference.preprocess import Tokenizer, normalise, prepare


def old_pi05(*more: Change) -> list[Change]:
    """As LeRobot 0.4.4 or 0.5.0 saves pi0.5: without what 0.5.1 added."""

    def config(values: Any) -> None:
        for key in ("use_relative_actions", "relative_exclude_joints", "action_feature_names"):
            values.pop(key, None)

    relative = (without(PRE, "relative_actions_processor"), without(POST, "absolute_actions_processor"))
    return [edited("config.json", config), *relative, *more]


def trained(**values: Any) -> Change:
    content = {"dataset": {"repo_id": "lab/cups"}, "policy": {"type": "pi05"}, "steps": 30_000, **values}

    def write(folder: Path) -> None:
        (folder / "train_config.json").write_text(json.dumps(content))

    return write


def shown_state(found: PolicySpec, state: list[float]) -> str:
    assert found.prompt is not None
    assert found.state is not None
    tokenizer = Tokenizer(DATA / TOKENIZERS["pi05"] / "tokenizer.json", found.prompt)
    text = tokenizer.text("pick", normalise(np.array(state, np.float32), found.state.norm))
    assert prepare({"state": np.array(state, np.float32), "instruction": "pick"}, found, tokenizer).ids is not None
    return text.removeprefix("Task: pick, State: ").removesuffix(";\nAction: ")


def test_whether_the_state_is_padded_must_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("pi05", tmp_path, *old_pi05())
    assert infer(folder, "pi05", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give --prompt-state padded (0.4: the prompt has 32 numbers of the state, zeros at the end) or" in line
    assert "--prompt-state unpadded (0.5 and later: its 7)" in line

    assert infer(folder, "pi05", tmp_path, "--prompt-state", "unpadded") == 0
    np.testing.assert_allclose(actions(tmp_path), expected("pi05"), rtol=0, atol=1e-5)
    assert infer(folder, "pi05", tmp_path, "--prompt-state", "padded") == 0
    assert np.abs(actions(tmp_path) - expected("pi05")).max() > 0.1
    assert main(["inspect", str(folder), *given("pi05"), "--prompt-state", "padded"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "padded with zeros to 32 numbers in the prompt" in shown
    assert main(["inspect", str(folder), *given("pi05"), "--prompt-state", "unpadded"]) == 0
    assert "joint_0 to joint_6 (1); unpadded in the prompt" in " ".join(capsys.readouterr().out.split())


def test_what_tells_whether_the_state_is_padded(tmp_path: Path) -> None:
    middle = spec(DATA / "pi05/checkpoint", "pi05").state
    assert middle is not None
    state = (np.array(middle.norm.center) + 1e-3 * np.array(middle.norm.scale)).tolist()  # bin 128 of 256, as of zeros
    for number, (changes, padded) in enumerate(
        [
            ([], False),  # 0.6.1
            (old_pi05(trained()), True),
            (old_pi05(trained(cudnn_deterministic=False)), False),  # 0.5.0
            (old_pi05(trained(), setting(PRE, "pi05_prepare_state_tokenizer_processor_step", max_state_dim=9)), 9),
        ]
    ):
        found = spec(copied("pi05", tmp_path / str(number), *changes), "pi05")
        count = 32 if padded is True else padded or 7
        assert shown_state(found, state) == " ".join(["128"] * count)
    # Nothing to pad: nothing to ask.
    narrow = edited("config.json", lambda values: values.update(max_state_dim=7))
    assert spec(copied("pi05", tmp_path / "narrow", *old_pi05(narrow)), "pi05").state == middle


@pytest.mark.parametrize("family", ["act", "openvla", "pi0", "smolvla"])
def test_other_families_take_no_prompt_state(family: str) -> None:
    with pytest.raises(UserError, match=f"expected --prompt-state with pi0.5 only, found 'padded' for {family}"):
        spec(DATA / family / "checkpoint", family, prompt_state="padded")


def test_an_artifact_keeps_the_padding_and_shows_its_normalisation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = copied("pi05", tmp_path, *old_pi05(trained())), tmp_path / "artifact"
    assert main(["prune", str(folder), str(out), "--lossless", *given("pi05")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "padded with zeros to 32 numbers in the prompt" in shown
    assert "state: QUANTILES by q01, q99 of observation.state in policy_preprocessor_step_3_normalizer_" in shown
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["history"][0]["config"]["assumed"].startswith(
        "the state is padded in the prompt: train_config.json"
    )
