"""What lerobot's folders share. Expected numbers are lerobot's formulas by hand (its normalize_processor.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrc.artifact import NormStats
from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.checkpoints.lerobot import processors as lerobot
from rlrc.compressor.checkpoints.lerobot.features import PolicyFeature
from rlrc.compressor.checkpoints.lerobot.normaliser import Statistics, affine
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import normalise, unnormalise

STATISTICS = {
    "mean": [1.0, -2.0],
    "std": [0.5, 0.0],
    "min": [0.0, 3.0],
    "max": [4.0, 3.0],
    "q01": [-1.0, 0.0],
    "q99": [1.0, 8.0],
    "q10": [2.0, 2.0],
    "q90": [3.0, 6.0],
}


def norm(mode: str, inverse: bool = False, eps: float = 1e-8, **changes: Any) -> NormStats:
    values = {name: torch.tensor(numbers) for name, numbers in (STATISTICS | changes).items() if numbers is not None}
    return affine(mode, values, 2, eps, "state", inverse)


@pytest.mark.parametrize(
    ("mode", "raw", "expected"),
    [
        ("MEAN_STD", [2.0, -2.0], [2.0, 0.0]),
        ("MIN_MAX", [3.0, 3.0], [0.5, -1.0]),  # a range of zero becomes eps, so that its only value is -1
        ("QUANTILES", [0.0, 2.0], [0.0, -0.5]),
        ("QUANTILES", [2.0, 0.0], [2.0, -1.0]),  # not clipped
        ("QUANTILE10", [2.25, 6.0], [-0.5, 1.0]),
    ],
)
def test_modes(mode: str, raw: list[float], expected: list[float]) -> None:
    assert normalise(raw, norm(mode)).tolist() == pytest.approx(expected, abs=1e-6)
    assert unnormalise(expected, norm(mode, inverse=True)).tolist() == pytest.approx(raw, abs=1e-6)


def test_eps_is_added_on_the_way_in_only() -> None:
    """And keeps a deviation of zero invertible."""
    assert norm("MEAN_STD").scale == (0.5 + 1e-8, 1e-8)
    assert norm("MEAN_STD", inverse=True).scale == (0.5, 1e-8)
    assert norm("MEAN_STD", eps=0.25).scale == (0.75, 0.25)


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        (
            "QUANTILES",
            dict.fromkeys(("q01", "q99")),
            "expected 2 finite .* as q01 of state, which QUANTILES takes, found",
        ),
        ("QUANTILE10", {"q90": None}, "as q90 of state, .* found only mean, std, min"),
        ("MEAN_STD", {"std": None}, "as std of state"),
        ("MIN_MAX", {"min": [0.0], "max": [1.0]}, r"as min of state, which MIN_MAX takes, found 1: \[0.0\]"),
        ("MEAN_STD", {"std": [1.0, 1.0, 1.0]}, "as std of state, which MEAN_STD takes, found 3"),
        ("MEAN_STD", {"mean": [float("inf")] * 2}, r"as mean of state, .* found \[inf, inf\]"),
        ("QUANTILES", {"q99": [float("nan"), 1.0]}, "as q99 of state"),
        ("MEAN_STD", {"std": [1, 2]}, "as std of state, which MEAN_STD takes, found int64 numbers"),
        ("MEAN_STD", {"mean": [True, False]}, "as mean of state, which MEAN_STD takes, found bool numbers"),
        ("MEAN_STD", {"std": [1.0, -0.5]}, "expected std of at least 0 in .* state, found -2 and -0.5 .* dimension 1"),
        ("MIN_MAX", {"min": [9.0, 3.0]}, "expected min of at most max in .* state, found 9 and 4 .* dimension 0"),
    ],
)
def test_statistics_that_do_not_fit(mode: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        norm(mode, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "feature", "groups"),
    [
        ("action", "action", {"": "action"}),
        ("buffer_observation_images_wrist_left", "observation.images.wrist_left", {"": None}),
        ("observation.images.wrist.left", "observation.images.wrist_left", {"": None}),  # as LeRobot migrates it
        ("so100.buffer.action", "action", {"so100": None}),
        ("so100-red_buffer_observation_state", "observation.state", {"so100-red": None}),
        ("aloha.observation.state", "observation.state", {"aloha": None}),
        ("lab/arm/action", "action", {"lab/arm": None}),
        ("observation.environment_state", "observation.state", {}),
        ("reaction", "action", {}),
    ],
)
def test_groups_of_statistics(stored: str, feature: str, groups: dict[str, str | None]) -> None:
    found = Statistics("file", {stored: {}}).names(feature)
    assert found == {group: name or stored for group, name in groups.items()}


def step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def folder(
    before: list[Any], after: list[Any] | None = None, state: Mapping[str, Any] | None = None, **config: Any
) -> Folder:
    features = {
        "observation.images.front": {"type": "VISUAL", "shape": [3, 20, 30]},
        "observation.image": {"type": "VISUAL", "shape": [3, 20, 30]},
        "observation.state": {"type": "STATE", "shape": [2]},
    }
    config = {
        "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [2]}},
        "chunk_size": 7,
        "normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY"),
        **config,
    }
    virtual = {
        "policy_preprocessor.json": {"steps": before},
        "policy_postprocessor.json": {"steps": after or []},
        "stats.safetensors": Tensors("stats", {name: torch.tensor(value) for name, value in (state or {}).items()}),
    }
    return Folder(Path("folder"), config, Tensors("folder", {}), virtual)


def test_processor_files() -> None:
    """Statistics of pictures have the shape (3, 1, 1); the way in and the way out have their own."""
    state = {
        "observation.images.front.mean": [[[0.5]], [[0.25]], [[0.0]]],
        "observation.images.front.std": [[[0.25]], [[0.5]], [[1.0]]],
        "observation.state.mean": [1.0, 2.0],
        "observation.state.std": [2.0, 4.0],
        "action.min": [0.0, 1.0],
        "action.max": [2.0, 5.0],
    }
    modes = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"}
    listed = {"observation.images.front": {"type": "VISUAL"}, "observation.state": {"type": "STATE"}}
    listed["observation.image"] = {"type": "VISUAL"}
    some = {"normalize_observation_keys": ["observation.images.front", "observation.state"]}
    norm = {"eps": 0.0, "norm_map": modes, "features": listed}
    opened = folder(
        [
            step("rename_observations_processor", rename_map={"observation.images.cam0": "observation.images.front"}),
            step("to_batch_processor"),
            step("smolvla_new_line_processor"),
            step("tokenizer_processor", max_length=12, padding_side="right", padding="longest", truncation=True),
            step("relative_actions_processor", enabled=False),
            {**step("normalizer_processor", **norm, **some), "state_file": "stats.safetensors"},
        ],
        [{**step("unnormalizer_processor", **norm), "state_file": "stats.safetensors"}, step("device_processor")],
        state,
        action_feature_names=["shoulder.pos", "gripper.pos"],
    )
    processors = lerobot.read(opened, True, ReadOptions())
    front, other = (processors.camera(feature) for feature in processors.inputs("VISUAL"))
    assert (front.name, front.height, front.width, front.resize) == ("cam0", 20, 30, "none")
    assert (front.mean, front.std) == ((0.5, 0.25, 0.0), (0.25, 0.5, 1.0))
    assert (other.name, other.mean, other.std) == ("image", (0.0,) * 3, (1.0,) * 3)
    # A policy that computes (x - 0.5) / 0.5 afterwards.
    (feature, _) = processors.inputs("VISUAL")
    after = processors.camera(feature, "pad", (8, 9), 0.5, 0.5)
    assert (after.height, after.width, after.resize) == (8, 9, "pad")
    assert (after.mean, after.std) == ((0.625, 0.5, 0.5), (0.125, 0.25, 0.5))

    spec = processors.state(processors.inputs("STATE")[0], width=5)
    assert spec.norm == NormStats((1.0, 2.0), (2.0, 4.0))
    assert (spec.names, spec.width) == (("joint_0", "joint_1"), 5)
    action = processors.action()
    assert action.norm == NormStats((1.0, 3.0), (1.0, 2.0))
    assert (action.horizon, action.names) == (7, ("shoulder.pos", "gripper.pos"))
    assert action.meaning == ("absolute", "gripper")
    assert processors.prompt is not None
    assert (processors.prompt.edits, processors.prompt.max_tokens) == (("newline",), 12)
    assert processors.prompt.truncate
    assert lerobot.read(opened, False, ReadOptions()).prompt is None


def test_prompt_of_pi05() -> None:
    steps = [step("pi05_prepare_state_tokenizer_processor_step"), step("tokenizer_processor", max_length=200)]
    prompt = lerobot.read(folder(steps), True, ReadOptions()).prompt
    assert prompt is not None
    assert prompt.template == "Task: {instruction}, State: {state};\nAction: "
    assert (prompt.state_bins, prompt.edits) == (256, ("strip", "blanks"))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            [step("relative_actions_processor", enabled=True)],
            [],
            "expected absolute actions, found an enabled relative_",
        ),
        (
            [],
            [step("absolute_actions_processor", enabled=True)],
            "found an enabled absolute_actions_processor in policy_post",
        ),
        ([step("image_crop_resize_processor")], [], "found 'image_crop_resize_processor'; upgrade rlrc"),
        ([], [step("normalizer_processor")], "expected processor steps that rlrc knows in policy_postprocessor.json"),
        ([{"config": {}}], [], "expected steps in folder/policy_preprocessor.json, found: KeyError"),
        ([], [], "expected a tokenizer_processor in folder/policy_preprocessor.json, found none"),
        ([step("tokenizer_processor", max_length=0)], [], "expected a positive whole number as max_length"),
    ],
)
def test_refused_steps(before: list[Any], after: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        lerobot.read(folder(before, after), True, ReadOptions())


def test_features_that_do_not_fit() -> None:
    processors = lerobot.read(folder([]), False, ReadOptions())
    with pytest.raises(UserError, match="expected three colours, height and width as the shape of depth"):
        processors.camera(PolicyFeature("depth", "VISUAL", (1, 20, 30)))
    with pytest.raises(UserError, match=r"expected one dimension in the shape of observation.state"):
        processors.state(PolicyFeature("observation.state", "STATE", (2, 2)))
    none = lerobot.read(folder([], output_features={}), False, ReadOptions())
    with pytest.raises(UserError, match="expected one ACTION in output_features"):
        none.action()
    assert none.action(default=3).dim == 3
