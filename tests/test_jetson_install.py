"""What a board is set up with: the folder of files, the script run twice, and every file as tools judge it.

Tools that are not here are skipped; `make jetson-check` installs them first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlrc.errors import UserError
from rlrc.jetson.board import install
from rlrc.jetson.board.remote import Shell
from rlrc.jetson.cli.install import Install
from rlrc.jetson.model import devices
from rlrc.runtime.cli import main

UNITS = ("rlrc-run@.service", "rlrc-serve@.service")
EXPOSURE = 2.5  # of 10, as systemd-analyze security counts; "OK" is below 5


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"there is no {name} here")
    return found


def called(*command: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "DESTDIR"} | options
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    install.write(tmp_path / "files", "rlrc==0.1.0")
    return tmp_path / "files"


def test_the_folder_has_every_jetpack(folder: Path) -> None:
    assert (folder / "package.env").read_text() == "PACKAGE=rlrc==0.1.0\n"
    assert (folder / "R36.env").read_text() == (
        "JETPACK=6.2\nUBUNTU=22.04\nPYTHON=3.10\nCUDA=12.6\nWHEELS=https://pypi.jetson-ai-lab.io/jp6/cu126\n"
    )
    assert {path.stem for path in folder.glob("R*.env")} == {
        jetpack.linux.partition(".")[0] for jetpack in devices.table().jetpacks.values()
    }


def test_a_wheel_goes_along(tmp_path: Path) -> None:
    wheel = tmp_path / "rlrc-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    install.write(tmp_path / "files", str(wheel))
    assert (tmp_path / "files/packages" / wheel.name).read_bytes() == b"wheel"
    assert (tmp_path / "files/package.env").read_text() == f"PACKAGE=packages/{wheel.name}\n"
    with pytest.raises(UserError, match=r"expected a wheel, found no file nowhere\.whl"):
        install.write(tmp_path / "other", "nowhere.whl")
    assert not (tmp_path / "other").exists()


def test_the_command_tells_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jetson", "install", "--write", str(tmp_path / "files"), "--package", "rlrc==0.1.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"on the board: sudo bash {tmp_path}/files/install.sh"
    assert (
        "or in a container, JetPack 6.2, SM 87: docker build -t rlrc:jetpack-6.2 "
        "--build-arg IMAGE=nvcr.io/nvidia/l4t-jetpack:r36.4.0 "
        "--build-arg WHEELS=https://pypi.jetson-ai-lab.io/jp6/cu126 "
        f"--build-arg SM=87 --build-arg PACKAGE=rlrc==0.1.0 {tmp_path}/files"
    ) in lines
    assert any("JetPack 7.0, SM 110" in line for line in lines)
    assert main(["jetson", "install", "--write", str(tmp_path / "files")]) == 2  # it is there already
    assert main(["jetson", "install"]) == 2
    assert "expected a Jetson, found another machine" in capsys.readouterr().err


def tree(root: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(root)): (path.read_text(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def test_services_are_put_in_place_and_then_left_alone(folder: Path, tmp_path: Path) -> None:
    root, trees = tmp_path / "root", []
    for _ in range(2):
        done = called("bash", folder / "install.sh", "service", DESTDIR=str(root))
        assert done.returncode == 0, done.stderr
        trees.append(tree(root))
    assert {f"etc/systemd/system/{unit}" for unit in UNITS} <= trees[0].keys()
    assert {"etc/udev/rules.d/70-rlrc.rules", "etc/logrotate.d/rlrc", "etc/rlrc/example.env"} <= trees[0].keys()
    assert trees[0] == trees[1]  # the second time not even touched
    (root / "etc/rlrc/example.env").write_text("mine")
    (root / "etc/logrotate.d/rlrc").write_text("old")
    called("bash", folder / "install.sh", "service", DESTDIR=str(root))
    assert (root / "etc/rlrc/example.env").read_text() == "mine"
    assert (root / "etc/logrotate.d/rlrc").read_text() == (folder / "rlrc.logrotate").read_text()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            "everything",
            "expected check, packages, user, python, onnxruntime, llama, service or doctor, found everything",
        ),
        ("check", "expected a Jetson"),
    ],
)
def test_the_script_refuses_in_one_line(folder: Path, stage: str, said: str) -> None:
    done = called("bash", folder / "install.sh", stage)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"install: error: {said}")


def test_it_runs_on_another_machine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a shell here: the folder is sent, the script runs there, its exit code is the command's."""
    monkeypatch.chdir(tmp_path)
    there = Shell(("sh", "-c"), "the board")
    monkeypatch.setenv("DESTDIR", str(tmp_path / "root"))
    assert Install("board", stages=("service",), sudo="env").install_on(folder, there) == 0
    assert (tmp_path / "root/etc/systemd/system/rlrc-run@.service").exists()
    assert Install("board", stages=("check",), sudo="env").install_on(folder, there) == 1
    assert (tmp_path / ".cache/rlrc-install/R36.env").exists()


# The files


def without_program(unit: str, into: Path) -> Path:
    """An instance whose program is there: what is checked is the rest."""
    text = (install.FILES / unit).read_text().replace("/opt/rlrc/venv/bin/rlrc", "/bin/true")
    into.joinpath(unit.replace("@", "@arm")).write_text(text)
    return into / unit.replace("@", "@arm")


def test_units_differ_where_they_have_to() -> None:
    """Everything else is the same text."""
    run, serve = ((install.FILES / unit).read_text().splitlines() for unit in UNITS)
    only = {line for line in set(run) ^ set(serve) if not line.startswith("#")}
    assert only == {
        "Description=rlrc control loop %i",
        "Description=rlrc policy server %i",
        "WatchdogSec=5",
        "WatchdogSec=20",
        "Restart=on-abnormal",
        "Restart=on-failure",
        "RestartPreventExitStatus=2",
        "TimeoutStopSec=10",
        "TimeoutStopSec=20",
    }


def test_a_robot_that_was_stopped_is_not_started_again() -> None:
    """rlrc run ends with 1 where the guard stopped it: on-abnormal is signals, the watchdog and timeouts only."""
    text = (install.FILES / UNITS[0]).read_text()
    assert re.findall(r"^Restart=(.*)$", text, re.MULTILINE) == ["on-abnormal"]


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_the_units(unit: str, tmp_path: Path) -> None:
    done = called(tool("systemd-analyze"), "verify", "--man=no", without_program(unit, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_are_closed(unit: str, tmp_path: Path) -> None:
    file = without_program(unit, tmp_path)
    done = called(tool("systemd-analyze"), "security", "--offline=true", f"--threshold={int(EXPOSURE * 10)}", file)
    assert done.returncode == 0, done.stdout
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "MemorySwapMax=0"):
        assert line in file.read_text().splitlines()
    assert re.search(r"^WatchdogSec=\d+$", file.read_text(), re.MULTILINE)


def test_the_rules_are_assignments_and_matches() -> None:
    """As man 7 udev has them; udevadm verify, from systemd 254 on, says the same of them."""
    lines = [line for line in (install.FILES / "70-rlrc.rules").read_text().splitlines() if not line.startswith("#")]
    pair = r'(ACTION|SUBSYSTEMS?|DRIVER|ENV\{\w+\}|ATTRS?\{\w+\}|SYMLINK|GROUP|MODE)(==|!=|\+=|=)"[^"]*"'
    for line in lines:
        assert re.fullmatch(rf"{pair}(, {pair})*", line), line
    assert len(lines) == 5
    found = shutil.which("udevadm")
    if found and called(found, "verify", "--help").returncode == 0:
        done = called(found, "verify", install.FILES / "70-rlrc.rules")
        assert done.returncode == 0, done.stderr


def test_logrotate_takes_its_file(tmp_path: Path) -> None:
    text = (install.FILES / "rlrc.logrotate").read_text()
    (tmp_path / "conf").write_text(text.replace("/var/log/rlrc", str(tmp_path)).replace("su rlrc rlrc", "su root root"))
    (tmp_path / "conf").chmod(0o644)
    (tmp_path / "arm.jsonl").write_text("{}\n" * 100)
    done = called(tool("logrotate"), "--debug", "--force", "--state", tmp_path / "state", tmp_path / "conf")
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert "rotating log" in done.stderr


@pytest.mark.parametrize("script", [install.FILES / "install.sh", *sorted(Path("scripts").resolve().glob("*.sh"))])
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = called(tool("shellcheck"), "--format=json", script)
    assert json.loads(done.stdout) == []


def test_hadolint_has_nothing_to_say() -> None:
    done = called(tool("hadolint"), "--format", "json", install.FILES / "Dockerfile")
    assert json.loads(done.stdout) == []
