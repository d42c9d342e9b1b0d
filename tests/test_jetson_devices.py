"""The table of devices: its throughput against NVIDIA's own figures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlrc.errors import UserError
from rlrc.jetson.model import devices, probe
from rlrc.runtime import cli

# NVIDIA's figures of the fastest mode, dense: fp32 TFLOPS of the CUDA cores, int8 TOPS (half of the sparse ones) of the
# GPU alone, fp8 and fp4 TFLOPS. Of the Super modes only sparse int8 is published.
PUBLISHED = {
    "orin-nano-8gb": {"int8": 67 / 2},
    "orin-nano-4gb": {"int8": 34 / 2},
    "agx-orin-32gb": {"fp32": 3.3, "int8": 108 / 2},
    "agx-orin-64gb": {"fp32": 5.3, "int8": 170 / 2},
    "thor-t4000": {"fp4": 1200 / 2},
    "thor-t5000": {"fp4": 1035, "fp8": 517, "fp16": 517 / 2},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_throughput_is_what_nvidia_says(name: str) -> None:
    found = devices.device(name).peaks
    assert {kind: found[kind] / 1e12 for kind in PUBLISHED[name]} == pytest.approx(PUBLISHED[name], rel=0.02)


def test_slower_modes_are_nvidias_older_figures() -> None:
    """40 and 20 sparse int8 TOPS of the Orin Nanos before the Super modes."""
    assert devices.device("orin-nano-8gb", "15W").peaks["int8"] / 1e12 == pytest.approx(20, rel=0.03)
    assert devices.device("orin-nano-4gb", "10w").peaks["int8"] / 1e12 == pytest.approx(10, rel=0.03)


def test_every_figure_has_a_source_and_every_module_its_parts() -> None:
    table = devices.table()
    assert all(architecture.sources for architecture in table.architectures.values())
    assert all(jetpack.sources for jetpack in table.jetpacks.values())
    assert all(module.sources for module in table.devices.values())
    for module in table.devices.values():
        assert module.architecture in table.architectures
        assert set(module.jetpacks) <= set(table.jetpacks)
        assert 0.8 < module.visible_gib / module.memory_gib < 1
        fastest = module.modes[0]
        assert all(mode.mhz <= fastest.mhz and mode.watts <= fastest.watts for mode in module.modes)
    names = [name for name, module in table.devices.items() for name in (name, *module.aliases)]
    assert len(names) == len(set(names))


def test_devices_have_several_names() -> None:
    for name in ("orin-nano-super", "Jetson Orin Nano", "jetson_orin_nano_8gb", "orin-nano-8gb"):
        assert devices.find(name) == "orin-nano-8gb"
    assert devices.device("thor").sm == "11.0"


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("xavier", None, "expected a device of orin-nano-4gb, .*, cpu, found 'xavier'; the nearest is"),
        ("agx-orin", "25W", "expected a mode of MAXN, 50W, 30W, 15W for agx-orin-64gb, found '25W'"),
    ],
)
def test_other_devices_and_modes_are_refused(name: str, mode: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        devices.device(name, mode)


def test_a_broken_table_is_told(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text("[devices.x]\nmemory = 3\n")
    with pytest.raises(UserError, match=r"devices\.toml: expected the key architectures"):
        devices.read_table(devices.DeviceTable, file)
    with pytest.raises(UserError, match=r"found: No such file"):
        devices.read_table(devices.DeviceTable, tmp_path / "none.toml")


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SIDE", 256)
    monkeypatch.setattr(probe, "COPIED", 2**20)
    found = probe.this_machine()
    assert (found.name, found.sm, found.watts) == ("cpu", None, None)
    assert 1e8 < found.peaks["fp32"] < 1e14
    assert 1e7 < found.bandwidth < 1e12
    assert found.visible_bytes > 2**28


def test_the_command_prints_every_mode_and_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["jetson", "devices"]) == 0
    printed = capsys.readouterr().out
    assert (
        "agx-orin-64gb  MAXN            60   61.4  204.8    5.3   42.6   85.2      -      -  8.7   6.2, 7.2" in printed
    )
    assert "JetPack 7.0: Jetson Linux R38.2, Ubuntu 24.04, Python 3.12, CUDA 13.0, TensorRT 10.13" in printed
    assert cli.main(["jetson", "devices", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["modes"]) == sum(len(module["modes"]) for module in values["devices"].values())
    assert all(module["sources"] for module in values["devices"].values())
