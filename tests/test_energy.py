"""Power rails and counters as real machines show them in sysfs, and the arithmetic from them to joules."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlrc.benchmarks.measure import energy
from rlrc.runtime.cli import main

# A Jetson Orin Nano on JetPack 6: three rails, and the sum of their shunts, which is no rail.
ORIN = {
    "name": "ina3221",
    "in1_label": "VDD_IN", "in1_input": "4984", "curr1_input": "1216",
    "in2_label": "VDD_CPU_GPU_CV", "in2_input": "4976", "curr2_input": "352",
    "in3_label": "VDD_SOC", "in3_input": "4976", "curr3_input": "304",
    "in4_input": "6080", "in7_label": "sum of shunt voltages", "in7_input": "9360", "curr4_input": "1872",
}  # fmt: skip
# An AGX Orin: two chips; no rail has all, and the VDDQ is fed by VIN_SYS_5V0. A driver that is another one.
AGX = {
    "hwmon3": {
        "name": "ina3221",
        "in1_label": "VDD_GPU_SOC", "in1_input": "5000", "curr1_input": "1000",
        "in2_label": "VDD_CPU_CV", "in2_input": "5000", "curr2_input": "400",
        "in3_label": "VIN_SYS_5V0", "in3_input": "5000", "curr3_input": "800",
    },
    "hwmon4": {"name": "ina3221", "in2_label": "VDDQ_VDD2_1V8AO", "in2_input": "5000", "curr2_input": "100"},
    "hwmon5": {"name": "tmp451", "in1_label": "VDD_OTHER", "in1_input": "5000", "curr1_input": "100"},
}  # fmt: skip
# An x86 server: two packages with their memory, and a laptop's platform.
RAPL = {
    "intel-rapl": {},
    "intel-rapl:0": {"name": "package-0", "energy_uj": "262143328850", "max_energy_range_uj": "262143328850"},
    "intel-rapl:0:0": {"name": "dram", "energy_uj": "5", "max_energy_range_uj": "65712999613"},
    "intel-rapl:1": {"name": "package-1", "energy_uj": "1000000", "max_energy_range_uj": "262143328850"},
    "intel-rapl:2": {"name": "psys", "energy_uj": "9", "max_energy_range_uj": "262143328850"},
}


HWMON = "sys/class/hwmon"


def tree(root: Path, folder: str, chips: dict[str, dict[str, str]]) -> Path:
    for chip, files in chips.items():
        (root / folder / chip).mkdir(parents=True)
        for name, text in files.items():
            (root / folder / chip / name).write_text(text + "\n")
    return root


def orin(root: Path) -> Path:
    return tree(root, HWMON, {"hwmon1": ORIN})


def test_rails_of_an_orin_nano(tmp_path: Path) -> None:
    rails = energy.rails(orin(tmp_path))
    assert [rail.name for rail in rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert rails[0].watts() == pytest.approx(4.984 * 1.216)
    found, where = energy.sources(tmp_path)
    assert found is not None
    assert where == "INA3221: VDD_IN, VDD_CPU_GPU_CV, VDD_SOC"


def test_the_input_rail_is_the_whole_and_without_one_the_rails_add_up(tmp_path: Path) -> None:
    spent = energy.EnergyUsed({"VDD_IN": 6.0, "VDD_CPU_GPU_CV": 1.75, "VDD_SOC": 1.5})
    assert spent.total == 6.0
    rails = energy.rails(tree(tmp_path, HWMON, AGX))
    drawn = energy.EnergyUsed({rail.name: rail.watts() for rail in rails})
    assert len(rails) == 4
    assert drawn.total == pytest.approx(5.0 + 2.0 + 4.0)
    assert energy.EnergyUsed({"VDD_CORE": 1.0, "VDD_IO": 2.0}).total == 3.0  # of an unknown board


def test_packages_count_and_their_parts_do_not(tmp_path: Path) -> None:
    counters, _ = energy.counters(tree(tmp_path, energy.RAPL, RAPL))
    assert [counter.name for counter in counters] == ["package-0", "package-1"]


def test_a_counter_that_begins_again(tmp_path: Path) -> None:
    found, where = energy.sources(tree(tmp_path, energy.RAPL, RAPL))
    assert where == "RAPL: package-0, package-1"
    assert found is not None
    with energy.meter(found) as spent:
        (tmp_path / energy.RAPL / "intel-rapl:0/energy_uj").write_text("4000000")  # round from its largest value
        (tmp_path / energy.RAPL / "intel-rapl:1/energy_uj").write_text("3500000")
    assert spent.joules == pytest.approx({"package-0": 4.0, "package-1": 2.5})
    assert spent.total == pytest.approx(6.5)


def test_power_is_integrated_over_the_block(tmp_path: Path) -> None:
    """2 W, and 10 W from the middle on: the trapezoid between two samples is all that is uncertain."""
    root = tree(tmp_path, HWMON, {"hwmon0": {
        "name": "ina3221",
        "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "400",
    }})  # fmt: skip
    found, _ = energy.sources(root)
    assert found is not None
    current = found[0][0].current
    begun = time.perf_counter()
    with energy.meter(found) as spent:
        time.sleep(0.3)
        current.with_suffix(".new").write_text("2000\n")
        current.with_suffix(".new").replace(current)
        before = time.perf_counter() - begun
        time.sleep(0.3)
    expected = 2 * before + 10 * (spent.seconds - before)
    assert spent.joules["VDD_IN"] == pytest.approx(expected, abs=8 * 0.1)
    assert not any(thread.name == "power rails" for thread in threading.enumerate())


def test_a_rail_that_goes_away_is_an_error(tmp_path: Path) -> None:
    found, _ = energy.sources(orin(tmp_path))
    assert found is not None
    with pytest.raises(OSError, match="curr1_input"), energy.meter(found):
        found[0][0].current.unlink()
        time.sleep(0.1)


def test_joules_a_chunk_by_hand(tmp_path: Path) -> None:
    """10 W while it runs, 4 W when nothing does; 5 J a chunk of 5 actions in both rounds."""
    measured: Any = energy.row([(5.0, 10.0), (5.0, 10.0)], 4.0, 5)["energy"]
    assert measured["joules_chunk"] == {"value": 5.0, "low": 5.0, "high": 5.0}
    assert measured["joules_action"]["value"] == 1.0
    assert measured["joules_chunk_above_idle"]["value"] == 3.0
    assert (measured["watts"], measured["idle_watts"]) == (10.0, 4.0)


def test_calls_take_turns_and_the_idle_machine_comes_first(tmp_path: Path) -> None:
    found, _ = energy.sources(orin(tmp_path))
    assert found is not None
    order: list[tuple[str, float]] = []

    def call(name: str) -> None:
        begun = time.perf_counter()
        time.sleep(0.02)
        order.append((name, time.perf_counter() - begun))

    calls: dict[str, Callable[[], object]] = {name: partial(call, name) for name in "AB"}
    idle, taken = energy.measure(found, calls, 0.03, 2, lambda _: None)
    turns = [name for i, (name, _) in enumerate(order) if not i or order[i - 1][0] != name]
    assert turns == ["A", "B", "A", "B"]
    assert [len(taken[name]) for name in "AB"] == [2, 2]
    assert idle == pytest.approx(4.984 * 1.216, rel=1e-6)
    joules, watts = taken["A"][0]
    assert watts == pytest.approx(4.984 * 1.216, rel=1e-6)
    first = [seconds for name, seconds in order if name == "A"]
    assert min(first) * watts * 0.5 < joules < max(first) * watts * 2


def test_command_says_that_and_why_there_is_nothing(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reason = "not available: no INA3221 power rails, and no sys/class/powercap/intel-rapl:*"
    assert energy.sources(toy_artifact) == (None, reason)
    monkeypatch.setattr(energy, "sources", lambda: (None, reason))
    assert main(["bench", "energy", str(toy_artifact), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["source"] == reason
    assert result["rows"][0]["energy"] is None


def test_command_measures_where_it_can(
    toy_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = energy.sources(orin(tmp_path))
    monkeypatch.setattr(energy, "sources", lambda: found)
    assert main(["bench", "energy", str(toy_artifact), "--seconds", "0.05", "--rounds", "2", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["rows"][0]["energy"]
    assert measured["joules_action"]["value"] == pytest.approx(measured["joules_chunk"]["value"] / 3, abs=1e-5)
    assert main(["bench", "energy", str(toy_artifact), "--rounds", "1"]) == 2
    assert "two rounds" in capsys.readouterr().err
