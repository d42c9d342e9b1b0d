"""The stop-watch: order of the trials, warm-up, and what of it reaches the table. The policy is a clockwork."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rlrc.benchmarks.measure import latency
from rlrc.benchmarks.results import machine
from rlrc.errors import UserError
from rlrc.runtime.cli import main
from rlrc.runtime.inference import warmup


class Clockwork:
    """Takes the given time for every inference and writes down that it was called."""

    def __init__(self, name: str, calls: list[str], milliseconds: float = 0.0) -> None:
        self.name, self.calls, self.milliseconds = name, calls, milliseconds

    def infer(self, observation: Any) -> Any:
        self.calls.append(self.name)
        end = time.perf_counter() + self.milliseconds / 1e3
        while time.perf_counter() < end:
            pass
        return {"timing": {"preprocess_ms": 1.0, "vision_ms": 2.0, "decoder_ms": 3.0, "postprocess_ms": 4.0}}

    def reset(self) -> None: ...


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up of one call: these tests are about what follows."""
    monkeypatch.setattr(latency, "warm_up", lambda call, patience: (1, bool(call() or True), 1.0))


@pytest.mark.usefixtures("steady")
def test_trials_alternate_in_blocks_and_none_is_lost() -> None:
    calls: list[str] = []
    policies = {name: Clockwork(name, calls) for name in "AB"}
    ticks: list[int] = []
    timed = latency.measure(policies, {name: [{}] for name in "AB"}, trials=7, block=3, tick=ticks.append)
    assert "".join(calls) == "AB" + "AAABBB" * 3  # rounded up to whole blocks
    assert sum(ticks) == 18
    assert [len(timed[name].total) for name in "AB"] == [9, 9]
    assert [len(one) for one in timed["A"].rounds()] == [3, 3, 3]
    assert timed["B"].parts["vision"] == [2.0] * 9


@pytest.mark.usefixtures("steady")
def test_observations_take_turns() -> None:
    seen: list[Any] = []

    class Recorder(Clockwork):
        def infer(self, observation: Any) -> Any:
            seen.append(observation["number"])
            return super().infer(observation)

    latency.measure({"A": Recorder("A", [])}, {"A": [{"number": i} for i in range(3)]}, trials=5, block=1)
    assert seen == [0, 1, 2, 0, 1, 2]


@pytest.mark.usefixtures("steady")
def test_total_is_the_time_of_the_whole_call() -> None:
    timed = latency.measure({"A": Clockwork("A", [], 2.0)}, {"A": [{}]}, trials=10)
    assert min(timed["A"].total) >= 2.0
    row = latency.row(timed["A"])
    assert 2.0 <= row["latency_ms"]["p50"] < 20.0
    assert row["parts_ms"]["decoder"]["p99"] == 3.0


def test_warm_up_stops_when_two_windows_agree() -> None:
    # Windows of 20 calls with medians 10, 5, 4.95: the third differs by 1 % from the second.
    times = iter([10.0] * 20 + [5.0] * 20 + [4.95] * 20)
    assert warmup.warm_up(lambda: next(times))[:2] == (60, True)


def test_warm_up_gives_up_on_a_machine_that_never_settles() -> None:
    falling = (1000.0 * 0.99**i for i in range(10_000))
    assert warmup.warm_up(lambda: next(falling))[:2] == (warmup.CAP * warmup.WINDOW, False)


class Watch:
    """A clock that goes on when it is told to. In the place of the module time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Engine:
    """Every pass takes its milliseconds by the watch; a second engine's head and embedding take their own."""

    def __init__(self, watch: Watch, milliseconds: float) -> None:
        self.watch, self.milliseconds = watch, milliseconds

    def run(self, graph: str, inputs: Any) -> Any:
        self.watch.now += self.milliseconds / 1e3
        if graph == "decoder" and hasattr(self, "onnx"):
            self.onnx.run("embed", inputs)
            self.onnx.run("head", inputs)
        return {}

    def versions(self) -> dict[str, str]:
        return {}


class Driver:
    """Runs an engine's graphs in this order, an inference."""

    def __init__(self, engine: Engine, passes: list[tuple[str, Any]]) -> None:
        self.engine, self.passes = engine, passes

    def infer(self, observation: Any) -> Any:
        for graph, inputs in self.passes:
            self.engine.run(graph, inputs)
        return {"timing": {"preprocess_ms": 1.0, "vision_ms": 5.0, "decoder_ms": 99.0, "postprocess_ms": 0.5}}

    def reset(self) -> None: ...


TOKENS = [("vision", {}), *(("decoder", {"start": [start]}) for start in (0, 280, 281))]


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("passes", "beside", "expected"),
    [
        (TOKENS, False, {"prefill": 2, "decode": 4}),
        ([("vision", {}), ("decoder", {})], False, {"prefill": 2}),
        ([("vision", {}), ("prefix", {}), *[("step", {})] * 10], False, {"prefix": 2, "steps": 20}),
        # What comes before the blocks counts with them, the head does not.
        (TOKENS, True, {"prefill": 3, "decode": 6, "head": 3}),
    ],
)
def test_parts_of_every_way_to_decode(
    passes: Any, beside: bool, expected: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    monkeypatch.setattr(latency, "time", watch)
    engine = Engine(watch, 2.0)
    if beside:
        engine.onnx = Engine(watch, 1.0)  # type: ignore[attr-defined]
    policy = Driver(engine, passes)
    # The pictures are the policy's own figure.
    expected = {"preprocess": 1.0, "vision": 5.0, **expected, "postprocess": 0.5}
    for _ in range(2):  # measured once, however often it is asked for
        timed = latency.measure({"A": policy}, {"A": [{}]}, trials=2, block=1)["A"]
        assert list(timed.parts) == list(expected)
        assert {part: values[1] for part, values in timed.parts.items()} == pytest.approx(expected)


def test_warm_up_is_over_when_patience_is() -> None:
    """A slow policy is not called forty times before its robot moves."""
    calls, stable, median = warmup.warm_up(lambda: time.sleep(0.02) or 20.0, patience=0.05)
    assert (stable, median) == (False, 20.0)
    assert calls <= 3
    assert warmup.warm_up(lambda: 20.0, patience=0)[0] == 1


def test_no_trials_are_refused() -> None:
    with pytest.raises(UserError, match="at least one trial"):
        latency.measure({}, {}, trials=0)


def test_command_measures_and_writes_every_trial(toy_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "latency.json"
    arguments = ["bench", "latency", f"other={toy_artifact}", "--baseline", f"dense={toy_artifact}"]
    assert main([*arguments, "--trials", "40", "--out", str(out), "--json"]) == 0
    printed, result = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed == result
    assert [row["name"] for row in result["rows"]] == ["dense", "other"]
    for row in result["rows"]:
        assert len(row["trials_ms"]) == 40
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
        assert sum(part["p50"] for part in row["parts_ms"].values()) < 1.2 * row["latency_ms"]["p50"]
    assert result["machine"]["threads"] == 1
    assert "\n" not in json.dumps(result["rows"][0]["trials_ms"])
    assert len(out.read_text().splitlines()) < 400  # a list of trials is one line
    assert main([*arguments, "--out", str(out)]) == 2  # not overwritten
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["nowhere"], "nowhere"), ([], "at least one artifact"), (["a={toy}", "a={toy}"], "a different name")],
)
def test_bad_artifacts_are_one_line_and_exit_2(
    arguments: list[str], reason: str, toy_artifact: Path, capsys: Any
) -> None:
    assert main(["bench", "latency", *(argument.format(toy=toy_artifact) for argument in arguments)]) == 2
    complaint = capsys.readouterr().err
    assert reason in complaint
    assert len(complaint.splitlines()) == 1


def test_machine_of_a_jetson(tmp_path: Path) -> None:
    """As its files were written down on one."""
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/meminfo": "MemTotal:        7802868 kB\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "729600\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "1510400\n",
        "var/lib/nvpmodel/status": "pmode:0001\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=7W >\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    described = machine.describe(root=tmp_path)
    assert described["device"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (described["governor"], described["mhz"]) == ("schedutil", [730, 1510])
    assert described["power_mode"] == "7W"
    assert described["memory_gb"] == 7.4
    assert machine.unified_memory(tmp_path)
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert machine.power_mode(tmp_path) == "mode 1"


def test_clock_of_a_virtual_machine(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 2699.998\ncpu MHz\t\t: 2700.000\n")
    assert machine.clocks(tmp_path) == {"governor": None, "mhz": [2700, 2700]}
    assert machine.power_mode(tmp_path) is None
    assert not machine.unified_memory(tmp_path)


def test_processors_as_linux_writes_them() -> None:
    assert machine.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert machine.ranges([]) == ""


def test_machine_names_no_workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    described = machine.describe(threads=2)
    assert described["cores"] >= 1
    assert described["threads"] == 2
    assert described["versions"]["numpy"]
    import platform

    assert platform.node() not in json.dumps(described).split('"')
    assert platform.release() not in json.dumps(described)
    monkeypatch.chdir(tmp_path)
    inside, outside = tmp_path / "runs" / "a", Path("/elsewhere/deep/b")
    assert machine.command(["bench", f"x={inside}", f"--out={outside}", "plain"]) == "rlrc bench x=runs/a --out=b plain"
