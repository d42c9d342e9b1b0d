"""The stop switch: everything that may press it does, at once, also while the main thread is busy."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from rlrc.errors import UserError
from rlrc.runtime.control.stop_switch import SIGNALS, StopSwitch, ignore_first_interrupt

PATIENCE = 5.0  # seconds that a busy machine may take


def wait(condition: Callable[[], bool]) -> float:
    """The seconds until it holds."""
    begun = time.perf_counter()
    while not condition():
        assert time.perf_counter() - begun < PATIENCE
        time.sleep(0.0005)
    return time.perf_counter() - begun


def test_it_latches_and_keeps_the_first_reason() -> None:
    switch = StopSwitch()
    assert (switch.stopped, switch.reason) == (False, "")
    switch.press("one")
    switch.press("two")
    assert (switch.stopped, switch.reason) == (True, "one")
    switch.release()
    assert not switch.stopped
    switch.press("three")
    assert switch.reason == "three"


def test_reading_it_takes_less_than_a_microsecond() -> None:
    switch, times = StopSwitch(), []
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(10_000):
            switch.stopped  # noqa: B018
        times.append((time.perf_counter() - begun) / 10_000)
    assert min(times) < 1e-6


@pytest.mark.parametrize("how", ["a signal", "another thread"])
def test_pressing_ends_a_sleep_at_once(how: str) -> None:
    switch = StopSwitch()
    with switch.listen(keyboard=None):
        assert not switch.wait(0.01)

        def press() -> None:
            time.sleep(0.05)
            if how == "a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                switch.press("a thread")

        thread = threading.Thread(target=press)
        begun = time.perf_counter()
        thread.start()
        assert switch.wait(2 * PATIENCE)
        assert time.perf_counter() - begun < PATIENCE
        thread.join()
        while switch.wait(0.05):  # the signal presses twice: by its handler and by the thread that listens
            pass
        for _ in range(100_000 if how == "another thread" else 1):  # nobody sleeps: what is written fills up, no more
            switch.press("again")
        assert switch.wait(PATIENCE)
    begun = time.perf_counter()
    assert not switch.wait(0.02)  # nobody listens any more
    switch.press("late")
    assert time.perf_counter() - begun >= 0.02


@pytest.mark.parametrize("number", SIGNALS)
def test_signals(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    switch = StopSwitch()
    with switch.listen(keyboard=None):
        os.kill(os.getpid(), number)
        wait(lambda: switch.stopped)
        assert switch.reason == f"signal {number.name}"
        for _ in range(3):  # again and again: nothing raises, nothing ends
            os.kill(os.getpid(), number)
        switch.release()
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_signal_soon_after_does_not_end_the_program() -> None:
    """The switch listens for a moment more, in which the robot rests already."""
    switch = StopSwitch()
    with switch.listen(keyboard=None):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(lambda: switch.stopped)
        begun = time.monotonic()
        again = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        again.start()
    assert time.monotonic() - begun > 0.5
    assert not again.is_alive()  # the second one has come, and pytest goes on


def test_what_is_put_away_is_interrupted_by_the_second_signal_only() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), ignore_first_interrupt():
        with StopSwitch().listen(keyboard=None):
            pass
        signal.raise_signal(signal.SIGINT)
        written = True
        signal.raise_signal(signal.SIGINT)
    assert written
    assert signal.getsignal(signal.SIGINT) is before


def take_in_c() -> None:
    """As a library in C does, of which Python knows nothing: SIG_IGN."""
    ctypes.CDLL(None).signal(int(signal.SIGINT), ctypes.c_void_p(1))


@pytest.mark.parametrize(
    "take",
    [
        lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        lambda: signal.set_wakeup_fd(-1),
        take_in_c,
    ],
)
def test_signals_that_a_library_has_taken_are_taken_again(take: Callable[[], object]) -> None:
    before = signal.getsignal(signal.SIGINT)
    switch = StopSwitch()
    with switch.listen(keyboard=None):
        take()
        switch.reclaim_signals()
        os.kill(os.getpid(), signal.SIGINT)
        wait(lambda: switch.stopped)
        assert switch.reason == "signal SIGINT"
    assert signal.getsignal(signal.SIGINT) is before
    switch.reclaim_signals()  # nobody listens any more
    assert signal.getsignal(signal.SIGINT) is before


def test_descriptors_that_a_library_has_closed_do_not_keep_the_block() -> None:
    """In a process of its own: it closes all there are."""
    code = """
import os, time
from rlrc.runtime.control.stop_switch import StopSwitch
try:
    with StopSwitch().listen(keyboard=None):
        time.sleep(0.3)  # the thread waits
        os.closerange(3, 100)
except OSError:
    os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 7


def test_a_signal_of_others_is_none_of_ours() -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    switch = StopSwitch()
    try:
        with switch.listen(keyboard=None):
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.05)
            assert not switch.stopped
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_while_the_main_thread_computes() -> None:
    """As inference does: one long call that lets other threads run, and no Python code of the main thread."""
    switch, delays = StopSwitch(), list[float]()

    def shoot() -> None:
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        delays.append(wait(lambda: switch.stopped))

    with switch.listen(keyboard=None):
        thread = threading.Thread(target=shoot)
        thread.start()
        begun = time.perf_counter()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 1_500_000)
        busy = time.perf_counter() - begun
        thread.join()
    assert delays[0] < busy / 3
    assert switch.reason == "signal SIGINT"


def test_any_key_on_a_terminal() -> None:
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    switch = StopSwitch()
    try:
        with switch.listen(keyboard=theirs):
            assert "any key" in switch.sources
            os.write(ours, b" ")  # no Enter
            wait(lambda: switch.stopped)
            assert switch.reason == "a key"
        after = termios.tcgetattr(theirs)
        assert after[3] == before[3]  # lines and echo are back
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_that_hangs_up_stops_for_good() -> None:
    ours, theirs = os.openpty()
    switch = StopSwitch()
    try:
        with switch.listen(keyboard=theirs):
            os.close(ours)
            wait(lambda: switch.stopped)
            assert switch.reason == "lost the terminal"
            with pytest.raises(UserError, match="lost the terminal; start anew"):
                switch.release()
            assert switch.stopped
    finally:
        os.close(theirs)


def test_what_is_no_terminal_is_no_keyboard() -> None:
    ours, theirs = os.pipe()
    switch = StopSwitch()
    with switch.listen(keyboard=ours):
        assert switch.sources == ["signals SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGUSR1"]
        os.close(theirs)
        time.sleep(0.05)
        assert not switch.stopped
    os.close(ours)


def test_a_button_in_a_fifo(tmp_path: Path) -> None:
    path = tmp_path / "button"
    os.mkfifo(path)
    switch = StopSwitch()
    with switch.listen(keyboard=None, button=path):
        assert f"button {path}" in switch.sources
        writer = os.open(path, os.O_WRONLY)
        time.sleep(0.05)
        assert not switch.stopped
        os.write(writer, b"1")
        assert wait(lambda: switch.stopped) < 0.5
        assert switch.reason == "the button"
        switch.release()
        os.write(writer, b"1")
        wait(lambda: switch.stopped)
        switch.release()
        os.close(writer)  # who watched the button has died
        wait(lambda: switch.stopped)
        assert switch.reason == "lost the button"
        with pytest.raises(UserError, match="lost the button"):
            switch.release()


def test_a_button_as_a_descriptor() -> None:
    ours, theirs = socket.socketpair()
    switch = StopSwitch()
    with ours, theirs, switch.listen(keyboard=None, button=ours.fileno()):
        theirs.send(b"\x00")
        wait(lambda: switch.stopped)


def test_refuses_a_button_that_never_tells(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("0")
    for path, message in [
        (tmp_path / "file", "which reports no presses; for a GPIO, let gpiomon write into a FIFO"),
        (tmp_path, "which reports no presses"),
        (tmp_path / "none", "No such file or directory; give another --button"),
    ]:
        with pytest.raises(UserError, match=message), StopSwitch().listen(keyboard=None, button=path):
            pass
    with (
        (tmp_path / "file").open() as file,
        pytest.raises(UserError, match="that can be waited for"),
        StopSwitch().listen(keyboard=None, button=file.fileno()),
    ):
        pass
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # put back


def ask(url: str, token: str | None, method: str = "POST") -> tuple[int, dict]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_http() -> None:
    switch = StopSwitch()
    with switch.listen(keyboard=None, port=0):
        url, token = switch.url, switch.token
        assert url is not None
        assert token is not None
        assert url.startswith("http://127.0.0.1:")
        assert ask(url, None)[0] == 401
        assert ask(url, token + "x")[0] == 401
        assert ask(url, "\xe9")[0] == 401
        assert ask(url.replace("/stop", "/"), token)[0] == 404
        assert ask(url, token, "GET") == (200, {"stopped": False, "reason": ""})
        assert not switch.stopped
        assert ask(url, token) == (200, {"stopped": True, "reason": "HTTP"})
        assert switch.stopped
    with pytest.raises(urllib.error.URLError):
        ask(url, token)


def test_http_with_a_token_of_ones_own_and_a_client_that_stalls() -> None:
    switch = StopSwitch()
    with switch.listen(keyboard=None, port=0, token="secret"):
        assert switch.url is not None
        port = int(switch.url.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as stalled:
            stalled.send(b"POST /stop HTTP/1.1\r\n")  # and nothing more
            assert ask(switch.url, "secret")[0] == 200
        other = StopSwitch().listen(keyboard=None, port=port)
        with pytest.raises(UserError, match=f"expected a free port on 127.0.0.1, found {port}"), other:
            pass


def test_a_failure_of_the_thread_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    switch, ours, theirs = StopSwitch(), *socket.socketpair()

    def broken(*_: object) -> bytes:
        raise RuntimeError("broken")

    with ours, theirs, switch.listen(keyboard=None, button=ours.fileno()):
        with monkeypatch.context() as patch:
            patch.setattr(os, "read", broken)
            theirs.send(b"x")
            wait(lambda: switch.stopped)
        assert switch.reason == "lost the thread that listens (RuntimeError: broken)"
        with pytest.raises(UserError, match="lost the thread that listens"):
            switch.release()


PROGRAM = """
import multiprocessing, sys, time
import numpy as np
sys.path.insert(0, {tests!r})
from guarded import ABSOLUTE, at, guard_of
from rlrc.runtime.control.stop_switch import StopSwitch

def work():
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    worker.start()
    guard, switch, where = guard_of(ABSOLUTE, hz=50.0), StopSwitch(), at(0.0)
    guard.start(where)
    with switch.listen():
        print("pid", worker.pid, flush=True)
        for step in range(1, 1000):
            if switch.stopped:
                guard.stop(switch.reason)
            where = guard.step(at(where[0] + 0.002), where, 0.02).command
            print("sent", repr(float(where[0])), guard.stopped, flush=True)
            if step > 150:
                break
            time.sleep(0.02)
        print("end", guard.reason, worker.is_alive(), flush=True)
"""


def test_a_killed_worker_and_ctrl_c_twice_leave_the_robot_held(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(program)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C goes to all processes of the terminal's group
    )
    assert process.stdout is not None
    with process:
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if lines[-1][0] == "pid":
                worker = int(lines[-1][1])
            sent = sum(words[0] == "sent" for words in lines)
            if sent == 20 and lines[-1][0] == "sent":
                os.kill(worker, signal.SIGKILL)
            if sent == 40 and lines[-1][0] == "sent":
                os.killpg(process.pid, signal.SIGINT)
                os.killpg(process.pid, signal.SIGINT)
    assert process.returncode == 0
    positions = [float(words[1]) for words in lines if words[0] == "sent"]
    stopped = [words[2] == "True" for words in lines if words[0] == "sent"]
    first = stopped.index(True)
    assert 40 <= first <= 60  # we read what it sends with some delay
    assert positions[30] > positions[20]  # moved on while the worker was dead
    # .1 m/s and 2 m/s^2: .04 m/s less a step, so it rests after three.
    assert positions[first + 2 :] == [positions[first + 2]] * (len(positions) - first - 2)
    assert lines[-1] == ["end", "signal", "SIGINT", "False"]
