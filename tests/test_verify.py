"""The measure of agreement, on errors put in by hand: rolled bins, flips at ties, damaged goldens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import ActionSpec, Manifest, NormStats, VerifiedSpec
from rlrc.errors import UserError
from rlrc.runtime.cli.policy import Verify
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.policy import LocalPolicy

MakeToy = Callable[..., Path]


def rolled(toy: Any, dimension: int, steps: int) -> Any:
    """The toy policy with one action dimension's bins moved on by ``steps``, the last ones becoming the first."""
    head = toy.head.reshape(-1, 3, 4, 32).copy()
    head[:, :, dimension] = np.roll(head[:, :, dimension], steps, -1)
    return replace(toy, head=head.reshape(toy.head.shape))


def measure(path: Path) -> VerifiedSpec:
    policy = LocalPolicy.load(path, require_verified=False)
    action = policy.spec.action
    return verify.measure(
        policy, verify.read_golden(path / "golden.npz", policy.spec), verify.default_tolerances(action)
    )


def test_graphs_that_agree(toy_artifact: Path) -> None:
    record = measure(toy_artifact)
    assert (record.backend, record.observations, record.tokens) == ("onnxruntime", 8, 8 * 3 * 4)
    assert (record.token_flips, record.gripper_flips, record.chunk_jitter) == (0, 0, 0)
    assert record.max_error == (0, 0, 0, 0)
    assert "onnxruntime" in record.versions
    assert verify.failure_reason(record) is None


@pytest.mark.parametrize("steps", [1, 16])
def test_a_wrong_dimension(make_toy: MakeToy, toy: Any, tmp_path: Path, steps: int) -> None:
    path = make_toy(tmp_path / "rolled", weights=rolled(toy, 1, steps))
    reference = np.load(path / "golden.npz")["tokens"][..., 1]
    # A bin of dy is 2 / 32 * 0.02 = 0.00125 m wide; (8, 3) differences in action units.
    difference = ((reference + steps) % 32 - reference) * 0.00125
    record = measure(path)
    assert (record.token_flips, record.gripper_flips) == (8 * 3, 0)
    np.testing.assert_allclose(record.max_error, [0, np.abs(difference).max(), 0, 0], atol=1e-8)
    assert record.chunk_jitter == pytest.approx(np.abs(difference[:, 1:] - difference[:, :-1]).max(), abs=1e-8)
    assert "in action units where 0.000625 is tolerated" in str(verify.failure_reason(record))


def test_gripper_flips_cross_the_middle_of_its_range(make_toy: MakeToy, toy: Any, tmp_path: Path) -> None:
    # Half a turn of the bins takes every gripper command to the other side of 0.5, the middle of [0, 1].
    record = measure(make_toy(tmp_path / "opposite", weights=rolled(toy, 3, 16)))
    assert (record.token_flips, record.gripper_flips) == (24, 24)
    assert record.max_error == (0, 0, 0, 0.5)  # 16 bins of 2 / 32 * 0.5
    one_bin = measure(make_toy(tmp_path / "neighbour", weights=rolled(toy, 3, 1)))
    reference = np.load(tmp_path / "neighbour/golden.npz")["tokens"][..., 3]
    assert one_bin.gripper_flips == np.isin(reference, (15, 31)).sum()


class Answering:
    """Stands in for a policy: gives the tokens it is told, so that a flip can be put where it is wanted."""

    def __init__(self, spec: Any, golden: verify.Golden, tokens: np.ndarray) -> None:
        self.spec, self.golden, self.backend, self.engine = spec, golden, "onnxruntime", self
        centers = (tokens + 0.5) / spec.action.bins * 2 - 1
        actions = centers * np.array(spec.action.norm.scale) + np.array(spec.action.norm.center)
        self.answers = iter([{"tokens": t, "actions": a} for t, a in zip(tokens, actions, strict=True)])

    def ids(self, observation: Any) -> np.ndarray:
        assert self.golden.ids is not None
        assert self.golden.instructions is not None
        return self.golden.ids[list(self.golden.instructions).index(observation["instruction"])]

    def infer(self, observation: Any) -> Any:
        return next(self.answers)

    def versions(self) -> dict[str, str]:
        return {}


@pytest.mark.parametrize(("margin", "counts"), [(0.0, False), (0.0009, False), (0.0011, True), (1.0, True)])
def test_a_flip_counts_unless_the_reference_is_undecided(
    toy_artifact: Path, tiny_manifest: Manifest, margin: float, counts: bool
) -> None:
    spec = tiny_manifest.policy
    golden = verify.read_golden(toy_artifact / "golden.npz", spec)
    tokens = golden.tokens.copy()
    best = tokens[2, 1, 0]
    tokens[2, 1, 0] = other = (best + 5) % 32
    golden.logits[2, 1, 0, other] = golden.logits[2, 1, 0, best] - np.float32(margin)
    record = verify.measure(Answering(spec, golden, tokens), golden, verify.Tolerances(0.000625))  # type: ignore[arg-type]
    assert record.token_flips == 1
    error = abs(int(other) - int(best)) * 0.00125
    assert record.max_error[0] == pytest.approx(error if counts else 0, abs=1e-8)
    assert record.chunk_jitter == pytest.approx(error, abs=1e-8)  # reported in either case
    assert (verify.failure_reason(record) is not None) == counts


def test_a_flip_at_a_tie_to_a_third_token_counts(toy_artifact: Path, tiny_manifest: Manifest) -> None:
    spec = tiny_manifest.policy
    golden = verify.read_golden(toy_artifact / "golden.npz", spec)
    tokens = golden.tokens.copy()
    best = tokens[0, 0, 0]
    golden.logits[0, 0, 0, (best + 1) % 32] = golden.logits[0, 0, 0, best]
    tokens[0, 0, 0] = np.argmin(golden.logits[0, 0, 0])  # neither of the two that tie
    assert verify.failure_reason(verify.measure(Answering(spec, golden, tokens), golden, verify.Tolerances(0.000625)))  # type: ignore[arg-type]


def test_logits_closer_than_the_precision_can_tell_are_a_tie() -> None:
    # Between 16 and 32 float16 counts in steps of 1/64; the spacing 2^-10 of 20 is 0.0195, bfloat16's 2^-7 0.156.
    logits, rows = np.array([[20, 19.99, 19.9, 5]] * 3, np.float32), np.array([1, 2, 3])
    assert verify.is_tie(logits, rows).tolist() == [False, False, False]
    for precision, tied in {"fp16": [True, False, False], "bf16": [True, True, False], "int8": [False] * 3}.items():
        action = ActionSpec(1, ("a",), ("delta",), ("m",), NormStats((0.0,), (1.0,)), 100)
        assert verify.is_tie(logits, rows, verify.default_tolerances(action, precision).spacing).tolist() == tied


def test_the_default_limit_is_half_the_narrowest_bin() -> None:
    action = ActionSpec(1, ("a", "b"), ("delta", "delta"), ("m", "rad"), NormStats((0.0, 0.0), (0.5, 0.1)), 100)
    assert verify.default_tolerances(action).tolerance == pytest.approx(0.001)  # 0.1 * 2 / 100 / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_error": (0.1, 0.3)}, "an error of 0.3 in action units where 0.2 is tolerated"),
        ({"max_error": (float("nan"), 0.1)}, "an error of nan"),
        ({"max_error": ()}, "a record without observations"),
        ({"observations": 0}, "a record without observations"),
        ({}, "None"),
    ],
)
def test_failure(changes: dict[str, Any], message: str) -> None:
    record = VerifiedSpec("onnxruntime", 4, 8, 0, 0, (0.2, 0.1), 0.0, 0.2, {})
    assert message in str(verify.failure_reason(replace(record, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": None}, "to hold actions, .*logits, .* found actions, ids, image.corner4, .*, state, tokens;"),
        ({"ids": np.zeros((8, 4), np.int64)}, r"expected ids of shape \(8, 5\) .*, found \(8, 4\)"),
        ({"image.corner4": np.zeros((8, 2, 32, 32, 3), np.uint8)}, r"image.corner4 of shape \(8, any, any, 3\)"),
        ({"image.corner4": None}, "found actions, ids, instructions,"),
        ({"image.wrist": np.zeros((8, 2, 2, 3), np.uint8)}, "found actions, ids, image.corner4, image.wrist,"),
        ({"actions": np.float32(0)}, r"expected actions of shape \(1, 3, 4\) .*, found \(\)"),
        ({"state": np.array([{}] * 8, object)}, "found: Object arrays cannot be loaded"),
        ({"actions": np.zeros((8, 3, 4), np.float32)}, "actions that follow from the logits"),
        ({"tokens": np.zeros((8, 3, 4), np.int64)}, "tokens and actions that follow from the logits"),
        ({"tokens": np.zeros((0, 3, 4), np.int64)}, r"expected tokens of shape \(8, 3, 4\) .*, found \(0, 3, 4\)"),
        ({"logits": np.full((8, 3, 4, 32), np.nan, np.float32)}, "expected finite logits"),
    ],
)
def test_read_golden_refuses(
    own_toy: Path, tiny_manifest: Manifest, changes: dict[str, np.ndarray | None], message: str
) -> None:
    arrays = dict(np.load(own_toy / "golden.npz")) | changes
    np.savez(own_toy / "golden.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message) as caught:
        verify.read_golden(own_toy / "golden.npz", tiny_manifest.policy)
    assert "\n" not in str(caught.value)


def test_read_golden_refuses_a_truncated_file(own_toy: Path, tiny_manifest: Manifest) -> None:
    file = own_toy / "golden.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"expected an .npz of plain arrays at .*golden.npz, found:"):
        verify.read_golden(file, tiny_manifest.policy)


def test_another_tokenizer_is_refused(toy_artifact: Path, tiny_manifest: Manifest) -> None:
    golden = verify.read_golden(toy_artifact / "golden.npz", tiny_manifest.policy)
    golden.ids[3, 0] = 6
    with pytest.raises(UserError, match=r"expected token ids \[6, .* found \[3, .*trained with"):
        verify.measure(LocalPolicy.load(toy_artifact), golden, verify.Tolerances(1.0))


def test_a_rounding_precision_may_miss_on_one_of_a_hundred() -> None:
    limits = verify.default_tolerances(ActionSpec(1, ("a",), ("delta",), ("m",), NormStats((0.0,), (0.5,)), 0), "int8")
    assert limits.of_range == 0.01
    error = np.full((200, 1), 0.009)  # of a range of 1
    error[[3, 77]] = 0.8
    assert verify._without_worst_percent(error).tolist() == [0.009]
    error[120] = 0.02
    assert verify._without_worst_percent(error).tolist() == [0.02]
    assert verify._without_worst_percent(error[:99]).tolist() == [0.8]  # of fewer, every one counts
    error[:3] = np.nan
    assert np.isnan(verify._without_worst_percent(error)).all()


@pytest.mark.parametrize(("errors", "passes"), [((0.01, 0.0), True), ((0.0, 0.0101), False), ((0.0, np.nan), False)])
def test_a_part_of_the_range_decides_where_it_is_given(
    toy_artifact: Path, errors: tuple[float, ...], passes: bool
) -> None:
    record = replace(measure(toy_artifact), max_error=(9.0, 9.0), range_error=errors, range_tolerance=0.01)
    assert (verify.failure_reason(record) is None) == passes


def test_command_passes(toy_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Verify(toy_artifact, json=True).run() == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["failures"], printed["verified"][0]["observations"]) == ([], 8)
    assert Verify(toy_artifact).run() == 0
    assert "0 of 96" in capsys.readouterr().out


def test_command_fails_with_exit_code_1(
    make_toy: MakeToy, toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_toy(
        tmp_path / "wrong", weights=rolled(toy, 0, 1)
    )  # its record says that it agrees; this machine differs
    assert Verify(path).run() == 1
    assert "check failed: onnxruntime: an error of" in capsys.readouterr().err


def test_command_refuses_a_golden_with_a_wrong_hash(own_toy: Path) -> None:
    damaged = bytearray((own_toy / "golden.npz").read_bytes())
    damaged[-1] ^= 1
    (own_toy / "golden.npz").write_bytes(damaged)
    with pytest.raises(artifacts.ArtifactError, match="expected sha256"):
        Verify(own_toy).run()


# Dimensions that never move in the data: a deviation or range of zero, of which normalisation makes some 1e-8


def acting(center: tuple[float, ...], scale: tuple[float, ...], bins: int = 0) -> ActionSpec:
    names = tuple(f"joint_{i}" for i in range(len(center)))
    meaning: Any = ("absolute",) * len(names)
    return ActionSpec(2, names, meaning, ("rad",) * len(names), NormStats(center, scale), bins)


@pytest.mark.parametrize("constant", [5e-9, 1e-8, 5e-7, 1e-6])
@pytest.mark.parametrize("bins", [0, 100])
def test_a_constant_dimension_has_no_say_in_the_limit(constant: float, bins: int) -> None:
    spec = acting((0.0, 0.3, 0.0), (0.5, constant, 0.1), bins)
    assert verify.default_tolerances(spec).tolerance == pytest.approx(0.1 / (bins or 256))  # half of 0.2 / bins


def test_a_dimension_of_steps_that_float32_does_not_resolve_is_constant() -> None:
    # Between 2048 and 4096 float32 counts in steps of 0.00024.
    assert verify.default_tolerances(acting((2500.0, 0.0), (0.001, 0.1))).tolerance == pytest.approx(0.1 / 256)
    assert verify.default_tolerances(acting((2500.0, 0.0), (1.0, 2.0))).tolerance == pytest.approx(1 / 256)


def test_a_narrow_dimension_is_not_constant() -> None:
    # A tenth of a millimetre beside whole turns: what is right for the others would hide all that it does.
    assert verify.default_tolerances(acting((0.0, 0.0), (180.0, 5e-5))).tolerance == pytest.approx(5e-5 / 256)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_constant_dimensions_hide_nothing(precision: str | None, toy_artifact: Path) -> None:
    policy = LocalPolicy.load(toy_artifact)
    spec = replace(policy.spec, action=acting((0.0, 0.3, 2.0), (0.5, 1e-8, 0.1)), prompt=None)
    random = np.random.default_rng(0)
    normalised = random.uniform(-1, 1, (8, 2, 3))
    right = (normalised * spec.action.norm.scale + spec.action.norm.center).astype(np.float32)
    golden, limits = verify.Golden({}, right), verify.default_tolerances(spec.action, precision)

    def record(actions: np.ndarray) -> VerifiedSpec:
        answering = Answering(spec, golden, np.zeros((0, 2, 3)))
        return verify.compare(answering, verify.ReplayOutputs(actions.astype(np.float64), None), golden, limits)  # type: ignore[arg-type]

    rounded = ((normalised + 1e-4) * spec.action.norm.scale + spec.action.norm.center).astype(np.float32)
    assert verify.failure_reason(record(rounded)) is None
    steps = right.copy()
    steps[..., 1] = np.nextafter(steps[..., 1], np.float32(1))  # the last bit of a float32
    assert verify.failure_reason(record(steps)) is None
    for dimension, part in ((0, 0.03), (2, 0.03)):
        wrong = right.copy()
        wrong[3, 1, dimension] += part * 2 * spec.action.norm.scale[dimension]
        assert verify.failure_reason(record(wrong)) is not None
    lost = right.copy()
    lost[2, 0, 1] = np.nan
    assert verify.failure_reason(record(lost)) is not None
    elsewhere = right.copy()
    elsewhere[2, 0, 1] = 0.0
    assert verify.failure_reason(record(elsewhere)) is not None
