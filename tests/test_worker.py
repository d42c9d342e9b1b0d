"""A process beside the loop: arrays there and back, errors, and every way to die, without ever waiting for it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from rlrc.errors import UserError
from rlrc.worker import Channel, WorkerDied, WorkerProcess


def double(channel: Channel, factor: float) -> None:
    """Multiplies what it is sent; "die", "fail" and "sleep" do just that."""
    while True:
        values, arrays = channel.receive()
        if values.get("do") == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if values.get("do") == "fail":
            raise UserError("expected something else; send that")
        if values.get("do") == "sleep":
            time.sleep(1e6)
        channel.reply({"pid": os.getpid()}, {name: factor * array for name, array in arrays.items()})


@pytest.fixture
def child() -> Any:
    process = WorkerProcess(double, (3,), "the doubler", 10_000, 10_000)
    yield process
    process.kill()


def test_arrays_of_any_kind_go_there_and_back(child: WorkerProcess) -> None:
    arrays = {
        "picture": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "state": np.array([0.5, -1]),
        "none": np.zeros((0, 4), np.float32),
    }
    child.ask({}, arrays)
    assert child.busy
    values, found = child.wait(30)
    assert not child.busy
    assert values["pid"] == child.pid != os.getpid()
    for name, array in arrays.items():
        assert np.array_equal(found[name], 3 * array)
        assert found[name].dtype == array.dtype
    child.ask({}, {"state": np.array([7.0])})
    child.wait(30)
    assert found["state"].tolist() == [1.5, -3]  # a copy: the next answer does not change it


def test_it_is_asked_one_thing_at_a_time(child: WorkerProcess) -> None:
    child.ask({"do": "sleep"})
    with pytest.raises(RuntimeError, match="the doubler got a request before it replied to the last one"):
        child.ask({})
    begun = time.monotonic()
    assert child.poll() is None
    assert time.monotonic() - begun < 0.05
    with pytest.raises(UserError, match=r"expected the doubler to reply within 0.1 s, found no reply"):
        child.wait(0.1)


def test_what_does_not_fit_is_refused(child: WorkerProcess) -> None:
    with pytest.raises(UserError, match=r"expected arrays of up to .* found image of 30000 after 0"):
        child.ask({}, {"image": np.zeros(30_000, np.uint8)})


def test_its_errors_come_as_errors(child: WorkerProcess) -> None:
    child.ask({"do": "fail"})
    with pytest.raises(UserError, match="expected something else; send that"):
        child.wait(30)


@pytest.mark.parametrize("killed", [True, False])
def test_a_dead_one_says_how_it_ended(child: WorkerProcess, killed: bool) -> None:
    child.ask({})
    child.wait(30)  # it runs
    child.ask({"do": "sleep" if killed else "die"})
    if killed:
        os.kill(child.pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(WorkerDied, match="the doubler ended"):
        while child.poll() is None:
            assert time.monotonic() - begun < 10


def test_ctrl_c_is_not_for_it(child: WorkerProcess) -> None:
    child.ask({})
    child.wait(30)
    os.kill(child.pid, signal.SIGINT)
    child.ask({}, {"x": np.ones(1)})
    assert child.wait(30)[1]["x"].tolist() == [3]
