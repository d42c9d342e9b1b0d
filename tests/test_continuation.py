"""Real-time chunking: what a chunk that goes on from a former one must begin with. Numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_decode import CONTINUOUS, VOCABULARY, Sums

from rlrc.artifact import FlowSpec
from rlrc.errors import UserError
from rlrc.runtime.inference import decode
from rlrc.runtime.inference.continuation import Continuation, soft_mask


def test_the_soft_mask_falls_behind_the_frozen_actions() -> None:
    # Equation 5 with d = 1 and H - s = 3: c = 2/3, 1/3.
    expected = [1, *(c * (math.exp(c) - 1) / (math.e - 1) for c in (2 / 3, 1 / 3))]
    np.testing.assert_allclose(soft_mask(3, 1), expected)
    assert soft_mask(2, 2).tolist() == [1, 1]
    assert soft_mask(0, 0).tolist() == []


def test_parallel_actions_begin_with_the_frozen_ones() -> None:
    actions = np.zeros((1, 2, 2), np.float32)
    previous = np.array([[0.07, 0.2], [0.01, 0.3]], np.float32)
    decoded = decode.parallel(lambda *_: {"actions": actions}, {}, CONTINUOUS, Continuation(previous, 1))
    np.testing.assert_allclose(decoded.actions, [[[0.07, 0.2], [0.0, 0.5]]], rtol=1e-6)


def test_autoregressive_tokens_follow_from_the_frozen_ones() -> None:
    run = Sums()
    # -0.03 and 0.9 are -0.3 and 0.8 normalised: bins 1 and 3, tokens 13 and 11.
    previous = np.array([[-0.03, 0.9]], np.float32)
    inputs = {"image_tokens": np.zeros((1, 3, 8)), "ids": np.array([[1, 2]])}
    decoded = decode.autoregressive(run, inputs, VOCABULARY, Continuation(previous, 1))
    assert decoded.tokens is not None
    # 303 + 13 + 11 = 327 mod 6 = 3 -> 13; 340 mod 6 = 4 -> 14.
    assert decoded.tokens.tolist() == [[[13, 11], [13, 14]]]
    assert [call["ids"] for call in run.calls] == [[[1, 2]], [[13]], [[11]], [[13]]]


def test_tokens_are_the_inverse_of_actions() -> None:
    tokens = np.array([[14, 11], [12, 13]])
    assert (
        decode.actions_to_tokens(decode.tokens_to_actions(tokens, VOCABULARY), VOCABULARY).tolist() == tokens.tolist()
    )


def test_flow_paints_the_former_actions_in() -> None:
    seen: list[np.ndarray] = []

    def run(graph: str, tensors: decode.Tensors) -> decode.Tensors:
        if graph == "step":
            seen.append(np.array(tensors["x"]))
        return {"velocity": np.ones((1, 2, 3), np.float32)} if graph == "step" else {}

    noise = np.array([[[1, 2, 3], [4, 5, 6]]], np.float32)
    previous = np.array([[0.05, 1.0], [0.1, 0.5]], np.float32)  # 0.5, 1 and 1, 0 normalised
    weight = 0.5 * (math.exp(0.5) - 1) / (math.e - 1)  # c = 1 / 2
    decoded = decode.flow(run, {}, CONTINUOUS, FlowSpec(2, 3), noise, Continuation(previous, 1))
    np.testing.assert_allclose(seen[0], noise, rtol=1e-6)  # at t = 1 nothing but noise
    # t = 0.5, after a step of -1/2: x = noise - 0.5 where nothing is painted in.
    x = noise - 0.5
    x[0, 0, :2] = [0.5 * 1 + 0.5 * 0.5, 0.5 * 2 + 0.5 * 1]
    x[0, 1, :2] = (1 - weight) * x[0, 1, :2] + weight * np.array([0.5 * 4 + 0.5 * 1, 0.5 * 5])
    np.testing.assert_allclose(seen[1], x, rtol=1e-6)
    last = (x - 0.5)[0, 1, :2]
    np.testing.assert_allclose(decoded.actions[0], np.array([[0.05, 1.0], last * [0.1, 0.5] + [0, 0.5]]), rtol=1e-6)
    assert noise[0, 0, 0] == 1


@pytest.mark.parametrize(("shape", "frozen"), [((3, 2), 1), ((1, 3), 1), ((1, 2), 2), ((1, 2), -1), ((2,), 0)])
def test_a_continuation_that_does_not_fit_is_refused(shape: tuple[int, ...], frozen: int) -> None:
    with pytest.raises(UserError, match="expected up to 2 previous actions of 2 dimensions, some of them frozen"):
        Continuation(np.zeros(shape, np.float32), frozen).check(CONTINUOUS)
