"""The decode drivers over graphs that are Python functions, with numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import ActionSpec, FlowSpec, NormStats, TokenSpec
from rlrc.runtime.inference import decode
from rlrc.runtime.inference.decode import NoAction

DATA = Path(__file__).parent / "data"
BINS = ActionSpec(1, ("dx", "grip"), ("delta", "gripper"), ("m", "1"), NormStats((0.0, 0.5), (0.1, 0.5)), 4)
CONTINUOUS = ActionSpec(2, ("dx", "grip"), ("delta", "gripper"), ("m", "1"), NormStats((0.0, 0.5), (0.1, 0.5)), 0)
# Rows 0..5 of the logits are tokens 10..15; token 14 is bin 0, 13 bin 1, ..., 11 bin 3.
VOCABULARY = ActionSpec(
    2, ("dx", "grip"), ("delta", "gripper"), ("m", "1"), NormStats((0.0, 0.5), (0.1, 0.5)), 4, TokenSpec(6, 10, 14)
)


def test_parallel_takes_the_first_of_equals_and_unnormalises() -> None:
    logits = np.array([[[[0, 7, 7, 0], [0, 0, 0, -1]]]], np.float32)
    decoded = decode.parallel(lambda graph, inputs: {"logits": logits}, {}, BINS)
    assert decoded.tokens is not None
    assert decoded.tokens.tolist() == [[[1, 0]]]
    np.testing.assert_allclose(decoded.actions, [[[-0.025, 0.125]]], rtol=1e-6)  # -0.25 * 0.1; -0.75 * 0.5 + 0.5


def test_parallel_over_a_vocabulary() -> None:
    logits = np.zeros((1, 2, 2, 6), np.float32)
    for place, row in (((0, 0), 4), ((0, 1), 1), ((1, 0), 5), ((1, 1), 0)):
        logits[0][place][row] = 1
    decoded = decode.parallel(lambda graph, inputs: {"logits": logits}, {}, VOCABULARY)
    assert decoded.tokens is not None
    assert decoded.tokens.tolist() == [[[14, 11], [15, 10]]]
    # Bins 0 and 3; then 15 and 10, which are no bins: the nearest, 0 and 3 again. Centers -0.75 and 0.75.
    np.testing.assert_allclose(decoded.actions, [[[-0.075, 0.875]] * 2], rtol=1e-6)


def test_parallel_continuous() -> None:
    actions = np.array([[[1.5, -1.0], [0.0, 0.5]]], np.float32)
    decoded = decode.parallel(lambda graph, inputs: {"actions": actions}, {}, CONTINUOUS)
    assert decoded.tokens is None
    assert decoded.actions.dtype == np.float32
    np.testing.assert_allclose(decoded.actions, [[[0.15, 0.0], [0.0, 0.75]]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_action_from_outputs_that_are_not_finite(bad: float) -> None:
    action = ActionSpec(1, ("dx",), ("delta",), ("m",), NormStats((0.0,), (1.0,)), 4)
    with pytest.raises(NoAction, match="expected finite logits, found 1 nan or inf"):
        decode.parallel(lambda graph, inputs: {"logits": np.array([[[[0, bad, 1, 2]]]], np.float32)}, {}, action)
    with pytest.raises(NoAction, match="expected finite actions, found 1 nan or inf"):
        decode.parallel(lambda *_: {"actions": np.array([[[0, 0], [bad, 0]]], np.float32)}, {}, CONTINUOUS)


def test_no_action_from_outputs_that_do_not_fit() -> None:
    with pytest.raises(NoAction, match=r"expected logits \(B, 1, 2, 4\), found \(1, 1, 4\)"):
        decode.parallel(lambda *_: {"logits": np.zeros((1, 1, 4), np.float32)}, {}, BINS)
    with pytest.raises(NoAction, match=r"expected actions \(B, 2, 2\), found \(1, 2, 3\)"):
        decode.parallel(lambda *_: {"actions": np.zeros((1, 2, 3), np.float32)}, {}, CONTINUOUS)


class Sums:
    """An engine that keeps the numbers of all its graph "decoder" was given; the token is 10 + their sum mod 6.

    Image tokens count 100 each.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.kept = np.array([7])  # of an earlier chunk

    def __call__(self, graph: str, tensors: decode.Tensors) -> decode.Tensors:
        assert graph == "decoder"
        self.calls.append({name: tensor.tolist() for name, tensor in tensors.items()})
        given = np.concatenate([np.full(tensors["image_tokens"].shape[1], 100), tensors["ids"][0]])
        self.kept = np.concatenate([self.kept[: tensors["start"][0]], given])
        assert len(self.kept) == tensors["end"][0]
        return {"logits": np.eye(6, dtype=np.float32)[[int(self.kept.sum()) % 6]]}


def test_autoregressive_feeds_back_tokens_and_counts_positions() -> None:
    run, ids = Sums(), np.array([[1, 2]])
    decoded = decode.autoregressive(run, {"image_tokens": np.zeros((1, 3, 8)), "ids": ids}, VOCABULARY)
    # 303 mod 6 = 3 -> 13; 316 mod 6 = 4 -> 14; 330 mod 6 = 0 -> 10; 340 mod 6 = 4 -> 14.
    assert decoded.tokens is not None
    assert decoded.tokens.tolist() == [[[13, 14], [10, 14]]]
    # Bins 1, 0; 10 counts as the nearest, 3; 0. Centers -0.25, -0.75; 0.75, -0.75.
    np.testing.assert_allclose(decoded.actions, [[[-0.025, 0.125], [0.075, 0.125]]], rtol=1e-6)
    assert [len(call["image_tokens"][0]) for call in run.calls] == [3, 0, 0, 0]
    assert [call["ids"] for call in run.calls] == [[[1, 2]], [[13]], [[14]], [[10]]]
    assert [(call["start"], call["end"]) for call in run.calls] == [([0], [5]), ([5], [6]), ([6], [7]), ([7], [8])]
    assert ids.tolist() == [[1, 2]]  # what it was given is left alone


def test_autoregressive_refuses_logits_that_are_not_finite_or_do_not_fit() -> None:
    inputs = {"image_tokens": np.zeros((1, 0, 8)), "ids": np.array([[1]])}
    with pytest.raises(NoAction, match="expected finite logits, found 6 nan"):
        decode.autoregressive(lambda *_: {"logits": np.full((1, 6), np.nan)}, inputs, VOCABULARY)
    with pytest.raises(NoAction, match=r"expected logits \(B, 6\), found \(1, 1, 6\)"):
        decode.autoregressive(lambda *_: {"logits": np.zeros((1, 1, 6))}, inputs, VOCABULARY)


def test_flow_steps_from_noise_to_actions() -> None:
    calls: list[tuple[str, decode.Tensors]] = []

    def run(graph: str, tensors: decode.Tensors) -> decode.Tensors:
        calls.append((graph, dict(tensors)))
        if graph == "prefix":
            return {"key.0": tensors["ids"] * 1.0}
        # v = x + 4 t + the prefix's number
        return {"velocity": tensors["x"] + np.float32(4) * tensors["t"][:, None, None] + tensors["key.0"][0, 0]}

    noise = np.array([[[1, 2, 3], [0, -1, 5]]], np.float32)
    inputs = {"image_tokens": np.zeros((1, 1, 8)), "ids": np.array([[2]]), "state": np.ones((1, 2))}
    decoded = decode.flow(run, inputs, CONTINUOUS, FlowSpec(steps=2, width=3), noise)
    # t = 1: x - (x + 6) / 2 = x / 2 - 3; t = 0.5: y - (y + 4) / 2 = y / 2 - 2, which is x / 4 - 3.5.
    x = noise / 4 - 3.5
    np.testing.assert_allclose(decoded.actions, x[..., :2] * [0.1, 0.5] + [0, 0.5], rtol=1e-6)
    assert decoded.actions.dtype == np.float32
    assert decoded.tokens is None
    assert [graph for graph, _ in calls] == ["prefix", "step", "step"]
    assert [tensors["t"].tolist() for _, tensors in calls[1:]] == [[1.0], [0.5]]
    assert [tensors["step"].tolist() for _, tensors in calls[1:]] == [[0], [1]]
    assert calls[1][1]["t"].dtype == np.float32
    assert calls[1][1]["step"].dtype == np.int64
    assert calls[1][1]["state"].tolist() == [[1, 1]]
    assert noise[0, 0, 0] == 1  # what it was given is left alone


def test_flow_times_are_those_of_the_official_code() -> None:
    times: list[float] = []

    def run(graph: str, tensors: decode.Tensors) -> decode.Tensors:
        times.extend(tensors["t"].tolist() if graph == "step" else [])
        return {"velocity": np.zeros((1, 2, 3), np.float32)} if graph == "step" else {}

    decode.flow(run, {}, CONTINUOUS, FlowSpec(10, 3), np.zeros((1, 2, 3), np.float32))
    np.testing.assert_allclose(times, np.load(DATA / "pi0/golden.npz")["timesteps"], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 2, 4), (2, 3)])
def test_flow_refuses_velocities_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(NoAction, match=r"expected velocity \(B, 2, 3\), found \("):
        decode.flow(
            lambda *_: {"velocity": np.zeros(shape)}, {}, CONTINUOUS, FlowSpec(2, 3), np.zeros((1, 2, 3), np.float32)
        )


def test_flow_refuses_actions_that_are_not_finite() -> None:
    def run(graph: str, tensors: decode.Tensors) -> decode.Tensors:
        return {"velocity": np.full((1, 2, 3), np.nan, np.float32)}

    with pytest.raises(NoAction, match="expected finite actions, found 4 nan or inf"):
        decode.flow(run, {}, CONTINUOUS, FlowSpec(2, 3), np.zeros((1, 2, 3), np.float32))


def test_actions_of_openvla_tokens() -> None:
    names = tuple("abcdefg")
    norm = NormStats((0.0,) * 7, (1.0,) * 7)
    action = ActionSpec(1, names, ("delta",) * 7, ("1",) * 7, norm, 255, TokenSpec(32064, 0, 31999))
    golden = np.load(DATA / "openvla/golden.npz")
    ids = np.resize(golden["decode_ids"], (38, 7))  # all 256 action tokens and five others, some of them twice
    expected = np.resize(golden["decode_normalized"], (38, 7))
    np.testing.assert_allclose(decode.tokens_to_actions(ids, action), expected, atol=1e-7)
