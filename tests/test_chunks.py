"""Which action is for which step; numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlrc.errors import UserError
from rlrc.runtime.control.chunks import STRATEGIES, Chunks


def chunk(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def sent(chunks: Chunks, *steps: int) -> list[float | None]:
    planned = [chunks.at(step) for step in steps]
    return [None if plan is None else round(float(plan.action[0]), 6) for plan in planned]


def test_a_late_chunk_has_missed_its_first_actions() -> None:
    chunks = Chunks("replace", 4)
    assert chunks.add(chunk(1, 2, 3, 4), start=10, step=12)
    assert sent(chunks, 12, 13, 14) == [3, 4, None]
    assert not chunks.add(chunk(5, 6, 7, 8), start=12, step=16)  # for the steps 12 to 15
    assert sent(chunks, 16) == [None]


def test_the_newest_chunk_replaces() -> None:
    chunks = Chunks("replace", 4)
    chunks.add(chunk(1, 2, 3, 4), start=0, step=0)
    assert sent(chunks, 0, 1) == [1, 2]
    chunks.add(chunk(20, 30, 40, 50), start=1, step=2)
    assert sent(chunks, 2, 3, 4, 5) == [30, 40, 50, None]


def test_synchronously_a_chunk_is_played_to_its_end() -> None:
    chunks = Chunks("synchronous", 3)
    assert chunks.needs_more(2)
    chunks.add(chunk(1, 2, 3), start=2, step=2)
    assert [chunks.needs_more(step) for step in (2, 3, 4, 5)] == [False, False, False, True]
    assert sent(chunks, 2, 3, 4, 5) == [1, 2, 3, None]
    some = Chunks("synchronous", 3, execute=2)
    some.add(chunk(1, 2, 3), start=0, step=0)
    assert sent(some, 0, 1, 2) == [1, 2, None]


def test_the_ensemble_counts_older_chunks_more() -> None:
    chunks = Chunks("ensemble", 3)
    chunks.add(chunk(0, 0, 6), start=0, step=0)
    chunks.add(chunk(0, 9, 9), start=1, step=1)
    weight = np.exp(-0.01)
    assert sent(chunks, 2) == [pytest.approx((6 + 9 * weight) / (1 + weight), abs=1e-5)]
    plan = chunks.at(2)
    assert plan is not None
    assert (plan.chunk, plan.place) == (2, 1)
    assert sent(chunks, 3) == [9]


def test_how_many_steps_are_played_before_asking_again() -> None:
    chunks = Chunks("replace", 5, execute=2)
    chunks.add(chunk(1, 2, 3, 4, 5), start=4, step=4)
    assert [chunks.needs_more(step) for step in (4, 5, 6)] == [False, False, True]
    eager = Chunks("replace", 5)
    eager.add(chunk(1, 2, 3, 4, 5), start=4, step=4)
    assert eager.needs_more(5)
    with pytest.raises(UserError, match="expected to execute 1 to 5 steps of a chunk, found 6"):
        Chunks("replace", 5, execute=6)


def test_a_chunk_goes_on_from_what_will_have_been_sent() -> None:
    chunks = Chunks("continue", 5)
    assert chunks.continuation(0) is None
    chunks.add(chunk(1, 2, 3, 4, 5), start=0, step=2)  # two steps late
    chunks.at(2)
    continuation = chunks.continuation(3)
    assert continuation is not None
    assert continuation.previous.ravel().tolist() == [4, 5]
    assert continuation.frozen == 2
    for strategy in STRATEGIES[:3]:
        other = Chunks(strategy, 5)
        other.add(chunk(1, 2, 3, 4, 5), start=0, step=0)
        assert other.continuation(1) is None


def test_nothing_outlives_an_episode() -> None:
    chunks = Chunks("continue", 5)
    chunks.add(chunk(1, 2, 3, 4, 5), start=0, step=0)
    chunks.clear()
    assert sent(chunks, 1) == [None]
    assert chunks.needs_more(1)
