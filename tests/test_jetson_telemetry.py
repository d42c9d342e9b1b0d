"""What a Jetson tells of itself, in the spellings of several releases; numbers are read off the text by eye."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jetson_trees import plant, recorded

from rlrc.runtime.board import monitor as boards
from rlrc.runtime.board.jetson import (
    MB,
    Reading,
    of_jtop,
    parse_tegrastats,
    power_mode,
    power_modes,
    read_sysfs,
    read_text,
)
from rlrc.runtime.board.monitor import Board, Stamped
from rlrc.runtime.cli import main
from rlrc.runtime.control import telemetry

PROFILE = Path(__file__).parents[1] / "examples/udp_arm.toml"
DRIVER = """
from rlrc.benchmarks.control.simulated_arm import SimulatedArm

class Told(SimulatedArm):
    def sense(self):
        sensed = super().sense()
        return sensed._replace(observation={**sensed.observation, "instruction": "wave"})

def open_robot(spec, instruction):
    return Told((32, 32), ("corner4",))
"""

# By the name of the line: watts of the module, GPU load and MHz, mean load of the processors and their fastest clock,
# load of the memory controller, degrees of the hottest, MB used and in all, MB swapped.
TOLD = {
    "tx1": (None, 0.39, 76, (0.17 + 0.11 + 0.65) / 4, 1734, 0.01, None, 3607, 3983, 873),
    "tx2": (5.297, 0.0, 114, 2.1 / 6, 2034, 0.01, 42.5, 3276, 7859, 1626),
    "nano": (1.75, 0.0, 76, 0.18 / 4, 1224, 0.0, 45.0, 1923, 3964, 191),
    "xavier-nx": (2.763, 0.0, 114, 1.02 / 6, 1397, 0.02, 46.5, 3168, 6851, 161),
    "xavier": (5.079, 0.0, 510, 0.11 / 4, 1907, 0.0, 39.5, 2690, 6854, 479),
    "agx-orin-jp5": (2.34 + 0.39 + 4.025, 0.0, 0, 0.0, 729, 0.0, 44.343, 4321, 62801, 19),
    "agx-orin-jp6": (2.412 + 1.607 + 4.707, 0.0, 0, 1.71 / 12, 2201, 0.03, 52.562, 18207, 62841, 86),
    "orin-nano-jp6": (5.251, 0.0, 305, 0.0, 1497, 0.15, 49.312, 1343, 7620, 165),
    "agx-orin-jp7": (5.139 + 3.268 + 5.5, 0.12, 1300, 1.91 / 12, 2201, 0.03, 52.968, 20642, 62817, None),
    "thor-jp71": (19.78, None, 314, 0.09 / 14, 972, 0.0, 38.875, 105265, 125772, None),
    "thor-jp72": (87.426, None, None, 0.05 / 14, 972, None, 63.281, 36529, 125749, 11),
    "thor-short": (28.548, None, None, 0.13 / 14, 1890, None, 44.218, 117456, 125772, None),
}


def test_every_recorded_line_has_its_numbers() -> None:
    assert recorded().keys() == TOLD.keys()


@pytest.mark.parametrize("name", TOLD)
def test_lines_of_every_release(name: str) -> None:
    found = parse_tegrastats(recorded()[name])
    watts, load, mhz, cpu_load, cpu_mhz, emc, hottest, used, total, swapped = TOLD[name]
    assert found.watts == (None if watts is None else pytest.approx(watts))
    assert (found.gpu_load, found.gpu_mhz) == (load, mhz)
    assert (found.cpu_load, found.cpu_mhz) == (pytest.approx(cpu_load), cpu_mhz)
    assert (found.emc_load, found.hottest) == (emc, hottest)
    assert (found.memory_used, found.memory_total) == (used * MB, total * MB)
    assert found.swap_used == (None if swapped is None else swapped * MB)


def test_rails_and_zones_by_name() -> None:
    found = parse_tegrastats(recorded()["agx-orin-jp5"])
    assert found.rails == pytest.approx(
        {"VDD_GPU_SOC": 2.34, "VDD_CPU_CV": 0.39, "VIN_SYS_5V0": 4.025, "VDDQ_VDD2_1V8AO": 0.301}
    )  # the unconnected channels are none
    assert found.celsius.keys() == {"cpu", "tboard", "soc2", "tdiode", "soc0", "tj", "soc1"}  # -256: powered down
    assert "pmic" not in parse_tegrastats(recorded()["tx2"]).celsius  # 50 degrees for ever


@pytest.mark.parametrize("line", ["", "tegrastats: not found", "RAM what/everMB CPU [] GR3D_FREQ VDD_IN 5W"])
def test_other_lines_tell_nothing(line: str) -> None:
    assert parse_tegrastats(line) == Reading()


def test_files_of_an_orin_nano(tmp_path: Path) -> None:
    found = read_sysfs(plant("orin-nano-jp62", tmp_path))
    assert found.watts == pytest.approx(4.984 * 1.856)
    assert found.rails.keys() == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}  # not the sum of the shunts
    assert (found.gpu_load, found.gpu_mhz, found.cpu_mhz) == (0.842, 1020, 1728)
    assert found.celsius == pytest.approx({"cpu": 53.25, "gpu": 53.437, "tj": 54.656})
    assert found.hottest == pytest.approx(54.656)
    assert (found.memory_total, found.memory_used) == (7802892 * 1024, (7802892 - 6123456) * 1024)
    assert (found.swap_used, found.throttled) == (0, ())
    assert found.overcurrent == {"under-voltage": 0, "average current": 0, "peak current": 0}
    assert (power_mode(tmp_path), power_modes(tmp_path)[3]) == ("MAXN_SUPER", "7W")


def test_files_of_a_thor_that_is_too_hot(tmp_path: Path) -> None:
    found = read_sysfs(plant("thor-jp71", tmp_path))
    assert found.watts == pytest.approx(12.04 * 0.64 + 12.04 * 0.96 + 5.088 * 1.74)  # no VIN among the files
    assert (found.gpu_load, found.gpu_mhz) == (None, 314)  # not the video decoder's node
    assert found.throttled == ("devfreq-gpu-gpc-0", "gpu")  # the fan turns, that holds nothing back
    assert found.overcurrent["peak current"] == 179
    assert found.swap_used == 2 * 2**30
    assert power_mode(tmp_path) == "120W"


def test_a_mode_without_a_name_is_told_by_its_number(tmp_path: Path) -> None:
    plant("orin-nano-jp62", tmp_path, var__lib__nvpmodel__status="pmode:0009\n")
    assert power_mode(tmp_path) == "mode 9"


def test_a_machine_that_is_no_board_has_no_rails(tmp_path: Path) -> None:
    assert read_sysfs(tmp_path) == Reading()
    assert power_mode(tmp_path) is None
    found = read_sysfs()
    assert found.rails == {}
    assert found.memory_total is not None
    assert found.memory_used is not None
    assert 0 < found.memory_used < found.memory_total


def test_a_sensor_that_answers_later_is_none(tmp_path: Path) -> None:
    """EAGAIN is what a pipe says that nobody has written to yet."""
    os.mkfifo(tmp_path / "temp")
    writer = os.open(tmp_path / "temp", os.O_RDWR)
    assert read_text(tmp_path / "temp") is None
    os.write(writer, b"40000\n")
    os.close(writer)
    assert read_text(tmp_path / "absent") is None


def test_jetson_stats_in_its_units() -> None:
    jetson = SimpleNamespace(
        gpu={"gpu": {"type": "integrated", "status": {"load": 97.5}, "freq": {"cur": 1575000, "max": 1575000}}},
        power={"rail": {"VDD_GPU": {"power": 37528, "volt": 12040}, "NC": {"power": 0}}, "tot": {"power": 87426}},
        memory={"RAM": {"tot": 128790528, "used": 37404672}},
        temperature={"gpu": {"temp": 62.9, "online": True}, "cv0": {"temp": -256, "online": False}},
    )
    found = of_jtop(jetson)
    assert (found.gpu_load, found.gpu_mhz, found.rails) == (0.975, 1575, {"VDD_GPU": 37.528})
    assert (found.celsius, found.memory_used) == ({"gpu": 62.9}, 37404672 * 1024)
    # It fills in what the others leave open, and nothing else.
    line = parse_tegrastats(recorded()["thor-jp72"])
    assert line.over(found) == replace(line, gpu_load=0.975, gpu_mhz=1575.0)


def test_zero_is_an_answer_too() -> None:
    assert Reading(gpu_load=0.0).over(Reading(gpu_load=0.5, gpu_mhz=7.0)) == Reading(gpu_load=0.0, gpu_mhz=7.0)


# A run


RUN = [
    Stamped(10.0, Reading({"VDD_IN": 5.0}, gpu_load=0.0, celsius={"tj": 50.0}, memory_used=10, swap_used=0)),
    Stamped(
        11.0,
        Reading(
            {"VDD_IN": 7.0}, gpu_load=0.5, celsius={"tj": 60.0}, memory_used=30, swap_used=4, throttled=("cpu", "gpu")
        ),
    ),
    Stamped(13.0, Reading({"VDD_IN": 9.0}, celsius={"tj": 55.0}, throttled=("gpu",), overcurrent={"peak current": 3})),
]


def test_a_run_in_one_summary() -> None:
    totals = boards.summary(RUN)
    assert totals is not None
    assert totals["watts"] == {"min": 5.0, "mean": 7.0, "max": 9.0}
    assert totals["joules"] == pytest.approx(6.0 * 1 + 8.0 * 2)
    assert totals["celsius"]["max"] == 60.0
    assert totals["gpu_load"] == {"min": 0.0, "mean": 0.25, "max": 0.5}
    assert totals["throttled"] == {"cpu": pytest.approx(1 / 3), "gpu": pytest.approx(2 / 3)}
    assert totals["overcurrent"] == {"peak current": 3}
    assert boards.told(totals) == (
        "7.0 W (max 9.0), 55.0 °C (max 60.0), 25.0 % GPU (max 50.0), 22.0 J, 0.00 GB used at most, swapped, "
        "cpu throttled 33% of the time, gpu throttled 67% of the time, peak current: 3 events"
    )
    json.dumps(totals)
    assert boards.summary([]) is None


def test_the_newest_reading_at_every_step() -> None:
    assert boards.at(RUN, [9.9, 10.0, 10.9, 12.0, 99.0]) == [None, *(RUN[i].reading for i in (0, 0, 1, 2))]
    kept = telemetry.Telemetry(4, 1)
    for sent in (9.0, 10.5, 12.0):
        kept.next()["sent"] = sent
        kept.commanded(np.zeros(1))
    columns = telemetry._board_columns(RUN, kept.rows["sent"])
    np.testing.assert_array_equal(columns["board.watts"], np.array([np.nan, 5, 7], np.float32))
    np.testing.assert_array_equal(columns["board.throttled"], np.array([np.nan, 0, 2], np.float32))
    np.testing.assert_array_equal(columns["board.gpu_load"], np.array([np.nan, 0, 0.5], np.float32))


def test_the_log_has_the_board_beside_the_steps(tmp_path: Path) -> None:
    kept = telemetry.Telemetry(4, 1)
    for sent in (9.0, 12.0):
        kept.next()["sent"] = sent
        kept.commanded(np.zeros(1))
    telemetry.write(kept, ("dx",), tmp_path / "log.jsonl", RUN)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert not any(name.startswith("board.") for name in first)  # nothing was read yet
    assert (second["board.watts"], second["board.celsius"], second["board.throttled"]) == (7.0, 60.0, 2.0)


# The process beside


def wait_for(readings: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not readings():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_board_is_read_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its files where there is no tegrastats."""
    monkeypatch.setenv("PATH", str(tmp_path))
    root = plant("orin-nano-jp62", tmp_path / "root")
    begun = time.monotonic()
    with Board.watched(root, 0.05) as board:
        assert board.is_there
        wait_for(lambda: len(board.readings()) > 2)
        latest = board.latest()
        assert latest == read_sysfs(root)
    kept = board.readings()  # also when the process and its file are gone
    assert all(begun < one.stamp < time.monotonic() and one.reading == latest for one in kept)
    assert len(kept) > 2


def test_what_is_old_is_given_up(tmp_path: Path) -> None:
    """The file is begun anew after so many readings, and the one before kept."""
    board, out = Board(tmp_path / "readings.jsonl"), tmp_path / "readings.jsonl"
    boards.record((Reading(gpu_mhz=float(i)) for i in range(8)), out, kept=3)
    assert [one.reading.gpu_mhz for one in board.readings()] == [3, 4, 5, 6, 7]
    assert board.latest() == Reading(gpu_mhz=7.0)
    boards.record((Reading(gpu_mhz=float(i)) for i in range(6)), out, kept=3)
    assert board.latest() == Reading(gpu_mhz=5.0)  # the new file has none yet
    boards.record((Reading(gpu_mhz=float(i)) for i in range(1000)), out)
    assert board.latest() == Reading(gpu_mhz=999.0)  # of a file that is longer than what is read for it


def test_tegrastats_is_asked_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name that says recorded lines stands in for NVIDIA's."""
    (tmp_path / "line").write_text(recorded()["thor-jp72"])
    tool = tmp_path / "bin/tegrastats"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho $$ > {tmp_path}/pid\n[ "$1 $2" = "--interval 100" ] || exit 1\n'
        f"while cat {tmp_path}/line; do echo; sleep .1; done\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    root = plant("thor-jp71", tmp_path / "root")
    with Board.watched(root, 0.1) as board:
        wait_for(board.readings)
        latest = board.latest()
    assert latest is not None
    assert latest.watts == 87.426  # tegrastats'
    assert latest.throttled == ("devfreq-gpu-gpc-0", "gpu")  # the files'
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("thread", [False, True])
def test_nothing_is_left_of_one_that_was_killed(tmp_path: Path, thread: bool) -> None:
    """Neither its process beside nor that one's folder."""
    code = f"""
import sys, time
from pathlib import Path
from threading import Thread
from rlrc.runtime.board.monitor import Board
def read():
  with Board.watched(Path({str(plant("orin-nano-jp62", tmp_path / "root"))!r}), 0.05) as board:
    while not board.readings():
        time.sleep(0.01)
    print("reads", flush=True)
    time.sleep(100)
if {thread}:
    Thread(target=read, daemon=True).start()
    time.sleep(100)
read()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    with process.stdout as told:
        assert told.readline() == b"reads\n"
        (folder,) = tmp_path.glob("rlrc-board-*")
        process.kill()
        process.wait()
    wait_for(lambda: not folder.exists())


def test_elsewhere_nothing_is_started(tmp_path: Path) -> None:
    with Board.watched(tmp_path) as board:
        assert not board.is_there
        assert board.latest() is None
    assert board.readings() == []


def test_the_loop_tells_of_the_board(
    arm_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its summary, its table and its log."""
    monkeypatch.setattr(boards, "ROOT", plant("orin-nano-jp62", tmp_path / "root"))
    (tmp_path / "board_driver.py").write_text(DRIVER)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["run", str(arm_toy), "--driver", "board_driver:open_robot", "--profile", str(PROFILE), "--hz", "20"]
    command += ["--late", "6", "--patience", "5", "--steps", "20"]
    assert main([*command, "--json", "--log", str(tmp_path / "log.jsonl")]) == 0
    told = json.loads(capsys.readouterr().out)["board"]
    assert told["watts"]["mean"] == pytest.approx(4.984 * 1.856)
    assert told["celsius"]["max"] == pytest.approx(54.656)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["board.watts"] == pytest.approx(4.984 * 1.856)
    assert main(command) == 0
    assert "board" in capsys.readouterr().out


def test_the_bench_tells_of_the_board(
    toy_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(boards, "ROOT", plant("thor-jp71", tmp_path / "root"))
    assert main(["bench", "latency", str(toy_artifact), "--trials", "300", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["board"]
    assert told["throttled"] == {"devfreq-gpu-gpc-0": 1.0, "gpu": 1.0}
