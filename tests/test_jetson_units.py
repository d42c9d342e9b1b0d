"""install.sh and the units for real: systemd as the first process of a machine within this one, for half a minute.

It needs root, namespaces and overlays, and leaves nothing behind: every mount is private, every change on an overlay.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlrc.jetson.board import install

ROOT = Path(__file__).parents[1]
SYSTEMD = Path("/lib/systemd/systemd")
CGROUPS = Path("/sys/fs/cgroup")
SECONDS = 40
NAMES = ("freezes", "hangs", "stops", "runs")

# What happens three seconds after the first state: nothing; a call that hangs, as Python can see or holding the
# interpreter's lock; an arm that is gone.
DRIVER = """
import ctypes, json, os, time
from pathlib import Path
from rlrc.benchmarks.control.simulated_arm import SimulatedArm

OUT, NAME = Path("/opt/out"), Path(__file__).stem
STATUS = ("NoNewPrivs", "CapEff", "Seccomp:", "Uid")

class Told(SimulatedArm):
    begun = None

    def sense(self):
        self.begun = self.begun or time.monotonic()
        if NAME != "runs" and time.monotonic() - self.begun > 3:
            if NAME == "stops":
                raise OSError("the arm is gone")
            (ctypes.PyDLL(None).sleep if NAME == "freezes" else time.sleep)(1000)
        sensed = super().sense()
        return sensed._replace(observation={**sensed.observation, "instruction": "wave"})

def writable(place):
    try:
        Path(place).write_text("x")
        return True
    except OSError:
        return False

def open_robot(spec, instruction):
    status = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(STATUS)]
    places = ("/etc/x", "/usr/x", "/root/x", "/home/x", "/opt/x", "/var/lib/rlrc/x", "/var/log/rlrc/x", "/tmp/x")
    told = {"status": dict(line.split(":", 1) for line in status), "writable": [p for p in places if writable(p)]}
    told["homes"] = os.access("/home", os.R_OK) or os.access("/root", os.R_OK)
    with (OUT / f"{NAME}.starts").open("a") as starts:
        starts.write(json.dumps(told) + "\\n")
    return Told((32, 32), ("corner4",))
"""


@pytest.fixture
def own_cgroup() -> Iterator[tuple[Path, str]]:
    """A control group for the machine within: systemd takes hold of all that are in its root."""
    version = "2" if (CGROUPS / "cgroup.procs").exists() else "1"
    parent = CGROUPS if version == "2" else CGROUPS / "systemd"
    group = parent / f"rlrc-check-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group, version
    time.sleep(1)
    for folder in sorted(group.rglob("*"), key=lambda path: -len(path.parts)):
        if folder.is_dir():
            folder.rmdir()
    group.rmdir()


def check_possible() -> None:
    if os.geteuid() != 0 or not SYSTEMD.exists() or shutil.which("unshare") is None:
        pytest.skip("needs root, systemd and unshare")
    overlay = "mount -t overlay o -o lowerdir=/opt,upperdir=/mnt/u,workdir=/mnt/w /opt"
    script = f"mount -t tmpfs x /mnt && mkdir /mnt/u /mnt/w && {overlay}"
    tried = subprocess.run(["unshare", "-mpfCu", "--mount-proc", "sh", "-c", script], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces or overlays here: {tried.stderr.decode().strip()}")


@pytest.mark.slow
def test_the_units_by_systemd(arm_toy: Path, tmp_path: Path, own_cgroup: tuple[Path, str]) -> None:
    check_possible()
    group, version = own_cgroup
    install.write(tmp_path / "files", "rlrc==0.1.0")
    drivers, out = tmp_path / "drivers", tmp_path / "out"
    out.mkdir()
    drivers.mkdir()
    for name in NAMES:
        (drivers / f"{name}.py").write_text(DRIVER)
    for folder in (drivers, out):
        folder.chmod(0o755)
    places = {
        "FILES": tmp_path / "files",
        "ARTIFACT": arm_toy,
        "PROFILE": ROOT / "examples/udp_arm.toml",
        "DRIVERS": drivers,
        "OUT": out,
        "CODE": ROOT,
        "BASE": sys.base_prefix,
        "PYTHON": Path(sys.executable).resolve().name,
        "SITE": site.getsitepackages()[0],
        "CGROUPS": version,
    }
    script = ROOT / "tests/data/jetson/inside.sh"
    command = f"echo $$ > {group}/cgroup.procs && exec unshare -mpfCu --kill-child=KILL --mount-proc bash {script}"
    environment = os.environ | {name: str(place) for name, place in places.items()}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["bash", "-c", command], env=environment, stdout=log, stderr=log)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(SECONDS)  # it runs until it is ended
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    check_installed(out)
    check_services(out)


def check_installed(out: Path) -> None:
    """Twice, the second time without a complaint."""
    assert (out / "install").read_text().splitlines() == [
        "install: user rlrc and its folders are there",
        "install: units are there: edit a copy of /etc/rlrc/example.env, then systemctl enable --now rlrc-run@NAME",
    ] * 2
    groups = (out / "user").read_text()
    assert all(f"({name})" in groups for name in ("video", "render", "dialout", "input"))
    assert (out / "folders").read_text() == "/var/lib/rlrc rlrc rlrc 2775\n/var/log/rlrc rlrc rlrc 2775\n"


def check_services(out: Path) -> None:
    starts = {name: (out / f"{name}.starts").read_text().splitlines() for name in NAMES}
    # Killed by systemd's watchdog and started again; stopped by the run's own watchdog or by the guard, or alive, and
    # left alone.
    assert len(starts["freezes"]) >= 2
    assert [len(starts[name]) for name in ("hangs", "stops", "runs")] == [1, 1, 1]
    assert "stopped: " in (out / "hangs.err").read_text()
    assert "stopped: the driver failed: OSError: the arm is gone" in (out / "stops.err").read_text()
    assert "ready:" in (out / "serves.out").read_text()
    assert (out / "serves.out").read_text().count("openpi:") == 1
    told = json.loads(starts["runs"][0])
    assert {name: text.split() for name, text in told["status"].items()} == {
        "Uid": [told["status"]["Uid"].split()[0]] * 4,
        "CapEff": ["0000000000000000"],
        "NoNewPrivs": ["1"],
        "Seccomp": ["2"],
    }
    assert int(told["status"]["Uid"].split()[0]) > 0
    assert told["writable"] == ["/var/lib/rlrc/x", "/var/log/rlrc/x", "/tmp/x"]
    assert not told["homes"]
