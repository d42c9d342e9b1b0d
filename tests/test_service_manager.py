"""systemd's side of the socket, played by a real one: what comes when, and that nothing comes once a loop hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ENVIRONMENT

from rlrc.errors import UserError
from rlrc.runtime.control.service_manager import Supervisor

PROFILE = Path(__file__).parents[1] / "examples/udp_arm.toml"
WATCHDOG_S = 0.8


class Manager:
    """``address`` as systemd would put it into NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def next(self, seconds: float = 60) -> str | None:
        self.socket.settimeout(seconds)
        try:
            return self.socket.recv(4096).decode()
        except TimeoutError:
            return None

    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6))}


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@rlrc-test-{os.getpid()}"
    manager = Manager(address)
    yield manager
    manager.socket.close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


def test_what_is_told(manager: Manager) -> None:
    now = [0.0]
    supervisor = Supervisor(manager.address, WATCHDOG_S, clock=lambda: now[0])
    supervisor.ready("runs\nat 20 Hz")
    assert manager.next() == "READY=1\nSTATUS=runs at 20 Hz"
    assert manager.next() == "WATCHDOG=1"
    for now[0] in (0.0, 0.1, 0.19, 0.2, 0.25, 0.41):
        supervisor.beat()
    assert [manager.next(), manager.next(), manager.next(0.05)] == ["WATCHDOG=1", "WATCHDOG=1", None]
    supervisor.stopping("asked to stop")
    assert manager.next() == "STOPPING=1\nSTATUS=asked to stop"


def test_nobody_listens() -> None:
    environment = {"WATCHDOG_USEC": "1000"}
    supervisor = Supervisor.from_environment(environment)
    supervisor.ready("runs")
    supervisor.beat()
    assert supervisor.seconds is None
    gone = Supervisor("/nowhere/notify", 1.0)
    gone.ready("runs")  # the socket of a manager that has ended: not worth stopping a robot for
    gone.beat()


def test_the_environment_is_systemds(listening: Manager) -> None:
    environment = listening.environment() | {"WATCHDOG_PID": str(os.getpid()), "OTHER": "stays"}
    assert Supervisor.from_environment(environment).seconds == pytest.approx(WATCHDOG_S)
    assert environment == {"OTHER": "stays"}  # children would speak in our name
    other = Supervisor.from_environment(listening.environment() | {"WATCHDOG_PID": "1"})
    assert other.seconds is None  # meant for another process
    with pytest.raises(UserError, match="expected microseconds in WATCHDOG_USEC, found 'soon'"):
        Supervisor.from_environment(listening.environment() | {"WATCHDOG_USEC": "soon"})


DRIVER = """
import time
from pathlib import Path
from rlrc.benchmarks.control.simulated_arm import SimulatedArm

class Hanging(SimulatedArm):
    def sense(self):
        while Path("hang").exists():
            time.sleep(0.01)
        sensed = super().sense()
        return sensed._replace(observation={**sensed.observation, "instruction": "wave"})

def open_robot(spec, instruction):
    return Hanging((32, 32), ("corner4",))
"""


def run(arm: Path, folder: Path, manager: Manager) -> subprocess.Popen[str]:
    (folder / "hanging_driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "rlrc.runtime.cli", "run", str(arm), "--driver", "hanging_driver:open_robot"]
    command += ["--profile", str(PROFILE), "--hz", "20", "--late", "6", "--patience", "5"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT | manager.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_loop_beats_until_it_hangs(arm_toy: Path, tmp_path: Path, listening: Manager) -> None:
    process = run(arm_toy, tmp_path, listening)
    try:
        assert listening.next() == f"READY=1\nSTATUS=running {arm_toy} at 20 Hz"
        assert [listening.next(WATCHDOG_S) for _ in range(6)] == ["WATCHDOG=1"] * 6
        (tmp_path / "hang").touch()
        time.sleep(WATCHDOG_S / 2)  # what was sent before
        while listening.next(0.01):
            pass
        assert listening.next(1.5 * WATCHDOG_S) is None  # so systemd ends it
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_loop_that_is_stopped_says_so(arm_toy: Path, tmp_path: Path, listening: Manager) -> None:
    process = run(arm_toy, tmp_path, listening)
    try:
        assert str(listening.next()).startswith("READY=1")
        process.send_signal(signal.SIGTERM)
        assert _until_stopping(listening) == "STOPPING=1\nSTATUS=stopped: asked to stop: signal SIGTERM"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def _until_stopping(manager: Manager) -> str | None:
    while (said := manager.next()) == "WATCHDOG=1":
        pass
    return said


def test_a_server_beats_too(toy_artifact: Path, listening: Manager) -> None:
    command = [sys.executable, "-m", "rlrc.runtime.cli", "serve", str(toy_artifact), "--port", "0"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT | listening.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert listening.next() == f"READY=1\nSTATUS=serving {toy_artifact}"
        assert [listening.next(WATCHDOG_S) for _ in range(5)] == ["WATCHDOG=1"] * 5
        process.send_signal(signal.SIGSTOP)  # nothing turns any more
        time.sleep(0.05)
        while listening.next(0.01):
            pass
        assert listening.next(1.5 * WATCHDOG_S) is None
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert _until_stopping(listening) == "STOPPING=1\nSTATUS=asked to end"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
