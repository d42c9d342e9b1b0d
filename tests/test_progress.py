"""Progress where no terminal is: a plain line soon, one every half minute, and one at the end."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time

import pytest
from subprocesses import environment

from rlrc import progress as module
from rlrc.progress import progress, status


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_S", 0.1)
    monkeypatch.setattr(module, "EVERY_S", 0.2)


def wait_for(capsys: pytest.CaptureFixture[str], lines: int) -> list[str]:
    found, deadline = "", time.monotonic() + 10
    while len(found.splitlines()) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        found += capsys.readouterr().err
    return found.splitlines()


def test_lines_come_while_a_step_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", 100) as tell:
        tell(40, "training")  # a resumed run begins there
        tell(50, "loss 0.5")
        first, second, *_ = wait_for(capsys, 2)
        tell(100, "loss 0.25")
    for line in (first, second):
        assert line.startswith("sft: 50 of 100, 0:00:0")
        assert line.endswith(" left, loss 0.5")
    assert capsys.readouterr().err.splitlines()[-1].startswith("sft: 100 of 100, 0:00:0")


def test_time_left_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 40, 10 in 20 s: the other 50 take 100 s."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    lines = module._Lines("sft", 100)
    clock[0] = 500.0  # of reading what it goes on from
    lines.count(40, "")
    clock[0] = 520.0
    lines.count(50, "")
    assert lines.line() == "sft: 50 of 100, 0:01:40 left"


def test_work_that_cannot_be_counted_says_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with status("rounding") as tell:
        assert wait_for(capsys, 1)[0].startswith("rounding: 0:00:0")
        tell("writing")
        assert any(line.startswith("writing: ") and line.endswith(" so far") for line in wait_for(capsys, 2))


def test_what_is_done_soon_and_what_others_show_leave_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    threads = threading.active_count()
    with progress("sft", 2) as tell:
        tell(1, "")
    with progress("sft", 2, shown=False) as tell, status("rounding", shown=False):
        tell(1, "")
        time.sleep(0.3)
    assert capsys.readouterr() == ("", "")
    assert threading.active_count() == threads


def test_on_a_terminal_it_is_a_bar() -> None:
    code = "from rlrc.progress import progress\nwith progress('sft', 4) as tell: tell(1, 'x'); tell(4, 'y')"
    ours, theirs = pty.openpty()
    given = environment(TERM="xterm", COLUMNS="100")
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=given, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "4/4" in shown
    assert "━" in shown
    assert done.stdout == b""
