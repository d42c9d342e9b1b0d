"""The doctor on recorded boards: what is fine, what to do about the rest; and on this machine, which is no Jetson."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jetson_trees import plant

from rlrc.jetson.board import doctor, doctor_live
from rlrc.jetson.board.doctor import Finding
from rlrc.runtime.cli import main


def findings(root: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(root)}


def test_an_orin_nano_as_it_should_be(tmp_path: Path) -> None:
    found = findings(plant("orin-nano-jp62", tmp_path))
    assert {finding.state for finding in found.values()} == {"ok"}
    assert all(finding.todo == "" for finding in found.values())
    assert found["module"].found == "orin-nano-8gb: Jetson Orin Nano 8GB"
    assert found["JetPack"].found == "R36.4.4, package 6.2.1+b38, taken as JetPack 6.2"
    assert found["TensorRT"].found == "10.3.0.30-1+cuda12.5"
    assert found["clocks"].found == "GPU fixed at 1020 MHz"
    assert found["heat"].found == "54.7 °C, 99.0 is the limit"
    assert found["memory"].found == "5.8 of 7.4 GiB free"
    assert found["CMA"].found == "213 of 256 MiB free"
    assert found["cameras"].found == "/dev/video0 vi-output, imx219 9-0010; /dev/video1 HD Pro Webcam C920"


def test_a_thor_in_trouble(tmp_path: Path) -> None:
    found = findings(plant("thor-jp71", tmp_path))
    assert found["module"].found.startswith("thor-t5000")
    assert found["JetPack"].found.endswith("taken as JetPack 7.0")  # R38.4 is not in the table, R38.2 is
    wrong = {name: finding for name, finding in found.items() if finding.state == "fix"}
    assert wrong.keys() == {"TensorRT", "libraries", "heat"}
    assert wrong["TensorRT"] == Finding(
        "TensorRT", "fix", "not installed, expected 10.13", "sudo apt-get install tensorrt python3-libnvinfer"
    )
    assert wrong["libraries"].found == "missing libcudnn.so.9, libnvinfer.so.10, libnvonnxparser.so.10"
    assert wrong["heat"].found == "108.9 °C, 114.5 is the limit; throttled: devfreq-gpu-gpc-0, gpu"
    advised = {name: finding for name, finding in found.items() if finding.state == "advice"}
    assert advised.keys() == {"power mode", "clocks", "supply", "memory", "swap", "CMA"}
    assert advised["power mode"].todo == "sudo nvpmodel -m 0"
    assert advised["clocks"].found == "GPU between 306 and 1575 MHz"
    assert advised["supply"].found == "peak current 179 times"
    assert advised["swap"].found == "2.0 GiB used on /dev/zram0, /swapfile"
    assert all(finding.todo for finding in (*wrong.values(), *advised.values()))
    assert found["cameras"].state == "none"


@pytest.mark.parametrize(
    ("changes", "name", "state", "said"),
    [
        ({"etc__nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 1\n"}, "JetPack", "fix", "R35.4.1"),
        (
            {"etc__os-release": 'NAME="Ubuntu"\nVERSION_ID="24.04"\n'},
            "system",
            "fix",
            "Ubuntu 24.04, expected Ubuntu 22",
        ),
        ({"usr__bin__python3": "-> python3.11"}, "system's Python", "fix", "3.11, expected 3.10"),
        ({"usr__bin__python3": None}, "system's Python", "none", "none at"),
        ({"usr__local__cuda__version.json": None}, "CUDA", "fix", "none at /usr/local/cuda, expected 12.6"),
        ({"usr__local__cuda__version.json": "{"}, "CUDA", "fix", "none at /usr/local/cuda, expected 12.6"),
        ({"usr__local__cuda__version.json": "[1, 2]"}, "CUDA", "fix", "none at /usr/local/cuda, expected 12.6"),
        ({"usr__local__cuda__version.json": '{"cuda": ["12.6"]}'}, "CUDA", "fix", "none at /usr/local/cuda, expected"),
        ({"usr__local__cuda__version.json": '{"cuda": {"version": 12.6}}'}, "CUDA", "fix", "none at /usr/local/cuda"),
        ({"usr__local__cuda__version.json": "[" * 100_000}, "CUDA", "fix", "none at /usr/local/cuda, expected 12.6"),
        ({"proc__swaps": "Filename\n/dev/zram0\n"}, "swap", "ok", "none"),
        ({"proc__meminfo": "MemAvailable: 904800 kB\nCmaTotal: 1024 kB\n"}, "memory", "none", "does not report it"),
        ({"proc__meminfo": "CmaTotal: 1024 kB\n"}, "CMA", "none", "no contiguous memory"),
        ({"var__lib__dpkg__status": "Status: install ok installed\nVersion: 1\n"}, "TensorRT", "fix", "not installed"),
        ({"usr__local__cuda__version.json": '{"cuda": {"version": "12.60"}}'}, "CUDA", "fix", "12.60, expected 12.6"),
        ({"var__lib__nvpmodel__status": "pmode:0003\n"}, "power mode", "advice", "7W, MAXN_SUPER is faster"),
        ({"sys__class__thermal__thermal_zone8__temp": "91000\n"}, "heat", "advice", "91.0 °C"),
        ({"sys__class__thermal__cooling_device2__cur_state": "1\n"}, "heat", "fix", "throttled: cpu"),
        ({"sys__class__hwmon__hwmon3__oc1_event_cnt": "2\n"}, "supply", "advice", "under-voltage 2 times"),
        ({"proc__meminfo": "MemTotal: 7802892 kB\nMemAvailable: 904800 kB\n"}, "memory", "fix", "0.9 of 7.4 GiB"),
        ({"proc__meminfo": "MemTotal: 7802892 kB\nMemAvailable: 3804800 kB\n"}, "memory", "advice", "3.6 of 7.4 GiB"),
        ({"proc__swaps": "Filename\n/dev/zram0 partition 100 0 5\n"}, "swap", "ok", "0.0 GiB used on /dev/zram0"),
    ],
)
def test_one_thing_that_is_otherwise(
    tmp_path: Path, changes: dict[str, str | None], name: str, state: str, said: str
) -> None:
    found = findings(plant("orin-nano-jp62", tmp_path, **changes))[name]
    assert found.state == state
    assert said in found.found
    assert bool(found.todo) == (state in ("advice", "fix"))


def test_links_of_a_card_lead_to_the_card(tmp_path: Path) -> None:
    """Absolute ones, as Debian makes them, would lead to this machine's files. The same files, behind links."""
    whole = findings(plant("orin-nano-jp62", tmp_path / "whole"))
    card = plant("orin-nano-jp62", tmp_path / "card")
    for path, kept in (
        ("usr/local/cuda", "usr/local/cuda-12.6"),
        ("usr/bin/python3", "usr/bin/python3.10"),
        ("etc/nvpmodel.conf", "etc/nvpmodel/nvpmodel_p3767_0003_super.conf"),
        ("usr/lib/aarch64-linux-gnu/libcudnn.so.9", "usr/lib/aarch64-linux-gnu/libcudnn.so.9.3.0"),
        ("etc/os-release", "usr/lib/os-release"),
        ("usr/lib/aarch64-linux-gnu/nvidia", "opt/nvidia/libraries"),
        ("var/lib/dpkg", "data/dpkg"),
    ):
        (card / kept).parent.mkdir(parents=True, exist_ok=True)
        alternative = card / "etc/alternatives" / Path(path).name
        alternative.parent.mkdir(exist_ok=True)
        if (card / path).is_symlink():
            (card / path).unlink()
            (card / kept).touch()
        else:
            (card / path).rename(card / kept)
        alternative.symlink_to(f"/{kept}")
        (card / path).symlink_to(f"/etc/alternatives/{alternative.name}")
    assert findings(card) == whole
    assert whole["system's Python"] == Finding("system's Python", "ok", "3.10")


def test_links_that_lead_nowhere_or_in_a_ring_are_as_nothing(tmp_path: Path) -> None:
    card = plant("orin-nano-jp62", tmp_path, usr__local__cuda__version="-> version")
    (card / "usr/local/cuda/version.json").unlink()
    (card / "usr/local/cuda/version.json").symlink_to("version.json")
    library = card / "usr/lib/aarch64-linux-gnu/libcudnn.so.9"
    library.unlink()
    library.symlink_to(f"/usr/lib/aarch64-linux-gnu/{library.name}")
    (card / "etc/os-release").unlink()
    (card / "etc/os-release").symlink_to("/../../../../../../../../etc/passwd")  # above a root is the root
    found = findings(card)
    assert (found["CUDA"].state, found["system"].found.split(",")[0]) == ("fix", "unknown")
    assert found["libraries"].found == "missing libcudnn.so.9"


def test_a_machine_that_is_no_jetson(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert found["board"] == Finding("board", "none", "no Jetson")
    assert all(finding.state in ("none", "ok") for finding in found.values())


def test_the_command_on_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = plant("thor-jp71", tmp_path / "root")
    assert main(["jetson", "doctor", "--root", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        "FIX heat             108.9 °C, 114.5 is the limit; throttled: devfreq-gpu-gpc-0, gpu; better cooling"
        in next(line for line in lines if " heat " in line)
    )
    assert len(lines) == len(doctor.examine(root))  # one line each
    assert main(["jetson", "doctor", "--root", str(root), "--json", "--out", str(tmp_path / "told.json")]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "told.json").read_text())
    assert {"name": "board", "state": "ok", "found": "NVIDIA Jetson AGX Thor Developer Kit", "todo": ""} in told[
        "findings"
    ]
    assert main(["jetson", "doctor", "--root", str(plant("orin-nano-jp62", tmp_path / "other"))]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "nowhere"], "expected a folder with a board's files, found none at nowhere"),
        (["artifact", "--root", "."], "expected an artifact or --root, found both"),
        (["artifact", "--trials", "0"], "expected at least one inference, found --trials 0"),
        (["artifact"], "expected an artifact folder at artifact, found nothing"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor_live, "examine", list)  # what this machine has is another test's matter
    assert main(["jetson", "doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_this_machine_and_an_artifact(toy_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything for real; what is not here says so, and an engine that is here answers."""
    out = tmp_path / "told.json"
    assert main(["jetson", "doctor", str(toy_artifact), "--trials", "10", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    told = json.loads(out.read_text())
    found = {finding["name"]: finding for finding in told["findings"]}
    assert found["onnxruntime"]["state"] == "ok"
    assert "CPU" in found["onnxruntime"]["found"]
    assert found["goldens on onnxruntime"]["found"].startswith("8 observations")
    assert f"{toy_artifact.name} onnxruntime: p50" in printed
    (row,) = told["rows"]
    assert len(row["trials_ms"]) == 10
    assert told["verified"][0]["token_flips"] == 0
    assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0  # it came home


@pytest.mark.parametrize(
    ("name", "code", "state", "found", "todo"),
    [
        (
            "onnxruntime",
            "print('1.24.0', 'CPUExecutionProvider')",
            "advice",
            "1.24.0 CPU, without the GPU",
            "jp6/cu126",
        ),
        ("onnxruntime", "print('1.24.0', 'CUDAExecutionProvider')", "ok", "1.24.0 CUDA", ""),
        ("llama_cpp", "print('0.3.36', 'GPU')", "ok", "0.3.36 GPU", ""),
        ("llama_cpp", "print('0.3.36')", "advice", "0.3.36, without the GPU", "rlrc jetson install"),
        ("tensorrt", "print('10.3.0')", "ok", "10.3.0", ""),
        ("tensorrt", "import tensorrt_that_is_absent", "advice", "does not import: ", "--system-site-packages"),
        (
            "tensorrt",
            "raise ModuleNotFoundError(\"No module named 'tensorrt'\")",
            "advice",
            "not installed",
            "--system",
        ),
        ("llama_cpp", "import os; os._exit(3)", "advice", "does not import: exit code 3", "rlrc jetson install"),
    ],
)
def test_engines_on_a_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, state: str, found: str, todo: str
) -> None:
    """What an engine says of itself there, in a process of its own."""
    monkeypatch.setattr(doctor_live, "ROOT", plant("orin-nano-jp62", tmp_path))
    monkeypatch.setitem(doctor_live.ENGINES, name, code)
    told = doctor_live.engine(name)
    assert (told.state, told.found[: len(found)]) == (state, found)
    assert todo in told.todo


def test_an_engine_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor_live.ENGINES, "tensorrt", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor_live, "IMPORT_S", 0.2)
    assert doctor_live.engine("tensorrt").state == "fix"


def test_an_artifact_that_does_not_agree_here(
    make_toy: Callable[..., Path], toy: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    wrong = make_toy(tmp_path / "wrong", weights=replace(toy, head=-toy.head))  # type: ignore[type-var, attr-defined]
    assert main(["jetson", "doctor", str(wrong), "--trials", "1"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "goldens on onnxruntime" in line)
    assert line.startswith("FIX")
    assert "in action units where 0.000625 is tolerated; export the artifact again" in line
