"""Plans: the roofline and memory by hand, refusals, rates, suggestions that do what they say, and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import Manifest, geometries
from rlrc.compressor.models.meta import build_on_meta
from rlrc.errors import UserError
from rlrc.jetson.model import memory as memory_model
from rlrc.jetson.model import operations, precision, roofline
from rlrc.jetson.model.devices import Device, device
from rlrc.jetson.model.operations import Op
from rlrc.jetson.model.plan import Plan, Setting, deadline_ms, of_geometry, plan, predict, prune
from rlrc.jetson.model.roofline import Efficiency, Stack
from rlrc.jetson.model.suggest import shortfall, suggest
from rlrc.jetson.model.work import DecisionWork, Load, Part
from rlrc.runtime import cli

MACHINE = Device("x", "a machine", "fast", "8.7", {"fp32": 1e12, "fp16": 1e13, "bf16": 1e13}, 1e11, 8 * 2**30, 10.0)


def setting(name: str, bits: str, where: str, mode: str | None = None, stack: Stack | None = None) -> Setting:
    return of_geometry(name, bits, device(where, mode), Load(), stack)


def planned(name: str, bits: str, where: str, hz: float | None = None) -> Plan:
    return plan(setting(name, bits, where), hz)


# The roofline


def test_the_longer_of_arithmetic_and_traffic_counts() -> None:
    """Half of 1e13 operations a second, half of 1e11 bytes a second, 1 us a kernel; no loss for small products."""
    reached = Efficiency(compute=0.5, side=0.0, bandwidth=0.5, launch=1e-6)
    bound = Part("", (Op(flops=1e10, weights=10**6, activations=10**6, side=1.0),))
    assert roofline.demand(bound, precision.precision("fp16"), MACHINE).seconds(reached) == pytest.approx(2e-3 + 1e-6)
    moved = Part("", (Op(flops=1e6, weights=10**9, activations=10**6, kernels=3, side=1.0),), times=2)
    # 1e9 weights of 2 bytes and 1e6 numbers of 2 bytes at 5e10 bytes a second, twice
    expected = 2 * (2.002e9 / 5e10 + 3e-6)
    assert roofline.demand(moved, precision.precision("fp16"), MACHINE).seconds(reached) == pytest.approx(expected)
    # In int4 4.5 bits: the integers and a 16-bit scale for 32 of them.
    expected = 2 * ((1e9 * 4.5 / 8 + 2e6) / 5e10 + 3e-6)
    assert roofline.demand(moved, precision.precision("int4"), MACHINE).seconds(reached) == pytest.approx(expected)


def test_small_products_reach_less_of_the_peak() -> None:
    reached = Efficiency(compute=1.0, side=3000.0, bandwidth=1.0, launch=0.0)
    part = Part("", (Op(flops=1e10, side=1000.0), Op(flops=1e10)))
    seconds = roofline.demand(part, precision.precision("fp16"), MACHINE).seconds(reached)
    assert seconds == pytest.approx(1e10 / (1e13 * 0.25) + 1e10 / 1e13)


def test_untold_stacks_are_between_both_and_few_bits_need_compiled_kernels() -> None:
    of: dict[Stack, float] = {"compiled": 0.9, "plain": 0.4}
    assert roofline.compute(precision.precision("bf16"), None, of) == pytest.approx(sqrt(0.36))
    assert roofline.compute(precision.precision("int4"), None, of) == 0.9
    assert roofline.compute(precision.precision("int4"), "plain", of) == 0.4
    low, high = planned("pi0", "bf16", "agx-orin").prediction.bounds
    assert low < planned("pi0", "bf16", "agx-orin").prediction.latency_ms < high
    told = plan(setting("pi0", "bf16", "agx-orin", stack="plain")).prediction
    assert told.latency_ms == pytest.approx(high)


def test_more_of_everything_takes_longer() -> None:
    latency = {
        key: predict(setting(*key)).latency_ms
        for key in (
            ("openvla-7b", "bf16", "agx-orin-64gb"),
            ("openvla-7b", "int4", "agx-orin-64gb"),
            ("openvla-7b", "bf16", "agx-orin-32gb"),
            ("openvla-7b", "bf16", "thor"),
            ("openvla-7b", "bf16", "agx-orin-64gb", "15W"),
        )
    }
    dense, rounded, smaller, thor, throttled = latency.values()
    assert thor < dense < smaller < throttled
    assert rounded < dense


# Memory


def test_memory_by_hand() -> None:
    part = Part("a", (), stored=1_000_000, table=200_000, live=5_000, scores=10**9)
    shared = Part("b", (), live=50_000)
    found = memory_model.predict(
        DecisionWork((part, shared), 1_000, ()), precision.precision("int4"), MACHINE, cameras=2
    )
    assert found.weights == 800_000 * 4.5 / 8 + 200_000 * 2
    assert (found.cache, found.activations) == (2_000, 100_000)
    assert found.cameras == 2 * 4 * 1280 * 720 * 2
    assert found.peak == sum((found.weights, 2_000, 100_000, found.cameras, memory_model.RUNTIME))
    assert found.building == memory_model.RUNTIME + memory_model.WORKSPACE + 3 * found.weights
    assert found.fits
    assert not replace(found, weights=8 * 2**30).fits


def test_what_fills_no_group_stays_in_16_bits() -> None:
    """SigLIP's MLP of 4304 channels is 134.5 groups of 32: rlrc quantize leaves that layer alone."""
    op = operations.linear(1, 4304, 1152)
    part = Part("a", (op,), stored=2 * op.weights)
    assert memory_model.weight_bytes(part, precision.precision("int4")) == op.weights * (4.5 / 8 + 2)
    assert memory_model.weight_bytes(part, precision.precision("int8")) == op.weights * 2
    reached = Efficiency(1.0, 0.0, 1.0, 0.0)
    seconds = roofline.demand(part, precision.precision("int4"), MACHINE).seconds(reached)
    assert seconds == pytest.approx((op.weights * 2 + op.activations * 2) / 1e11)


@pytest.mark.parametrize(("group", "bits"), [(64, 4.25), (128, 4.125)])
def test_larger_groups_have_fewer_scales_and_fill_fewer_layers(group: int, bits: float) -> None:
    """96 inputs are three groups of 32, and no whole number of groups of 64 or 128."""
    int4 = precision.precision("int4").regrouped(group)
    for inputs, each in ((256, bits), (96, 16)):
        op = operations.linear(1, inputs, 10)
        assert memory_model.weight_bytes(Part("a", (op,), stored=op.weights), int4) == op.weights * each / 8
    assert precision.precision("int8").regrouped(group) == precision.precision("int8")


def test_memory_on_a_cpu_keeps_what_is_widened_at_load() -> None:
    work = DecisionWork((Part("a", (), stored=1_000_000, table=200_000, live=2_000, scores=1_000),), 0, ())
    here = replace(MACHINE, sm=None)
    # Float32 activations and scores.
    assert memory_model.predict(work, precision.precision("fp16"), here, 1).activations == 4 * 3_000
    weights = {
        name: memory_model.predict(work, precision.precision(name), here, 1).weights for name in ("fp32", "fp16")
    }
    assert weights == {"fp32": 4_000_000, "fp16": 2_000_000 + 4 * 800_000}
    assert memory_model.predict(work, precision.precision("int4"), here, 1, base=7).runtime == 7 + memory_model.SESSION
    # Large tensors are not kept twice: of 1,000,000 numbers of 16 bits a quarter is left once they are widened, of
    # 100,000 all.
    large, small = (operations.Op(0, weights=weights) for weights in (1_000_000, 100_000))
    work = DecisionWork((Part("a", (large, small), stored=1_100_000),), 0, ())
    found = memory_model.predict(work, precision.precision("fp16"), here, 1)
    assert found.weights == 200_000 + 500_000 + 4_400_000


# What vla.cpp's report says a process took, without Linux: mebibytes. (SmolVLA took 1711 or 2527 of them, by flags that
# change how its weights are held.)
RESIDENT = [("pi0", "bf16", 5982), ("pi05", "bf16", 6008), ("openvla-oft-7b", "bf16", 15391)]


@pytest.mark.parametrize(("name", "bits", "mebibytes"), RESIDENT)
def test_peaks_are_near_what_others_measured_on_an_agx_orin(name: str, bits: str, mebibytes: int) -> None:
    load = Load(cameras=1 if name == "openvla-oft-7b" else 2, prompt_tokens=16)
    found = predict(of_geometry(name, bits, device("agx-orin"), load, None))
    assert found.memory.peak / 2**20 == pytest.approx(mebibytes, rel=0.15)


# Refusals and rates


@pytest.mark.parametrize(
    ("name", "bits", "where", "reason"),
    [
        ("openvla-7b", "fp8", "agx-orin", r"fp8 needs tensor cores of SM 8.9 or later, agx-orin-64gb has SM 8.7"),
        ("openvla-7b", "nvfp4", "orin-nx", r"fp4 needs tensor cores of SM 10.0 or later, orin-nx-16gb has SM 8.7"),
        ("pi05", "fp16", "thor", r"fp16 overflows in pi05: .*; use bf16"),
    ],
)
def test_precisions_are_refused_with_the_reason(name: str, bits: str, where: str, reason: str) -> None:
    found = planned(name, bits, where)
    (refusal,) = found.refusals
    assert re.match(reason, refusal)
    assert not found.possible
    assert found.prediction.latency_ms > 0  # as weights only


@pytest.mark.parametrize(
    ("name", "bits", "where"),
    [
        ("pi05", "bf16", "agx-orin"),
        ("pi05", "fp8", "thor"),
        ("pi0", "fp16", "agx-orin"),
        ("openvla-7b", "fp4", "t4000"),
    ],
)
def test_other_precisions_are_not(name: str, bits: str, where: str) -> None:
    assert planned(name, bits, where).refusals == ()


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(UserError, match=r"expected a precision of fp32, .*, found 'int3'"):
        precision.precision("int3")


def test_a_chunk_is_two_latencies_long_at_least() -> None:
    assert deadline_ms(horizon=1, hz=10) == 100
    assert deadline_ms(horizon=50, hz=50) == 500
    found = planned("smolvla-450m", "bf16", "agx-orin", hz=10)
    assert found.deadline_ms == 2500
    assert found.holds
    assert planned("openvla-7b", "bf16", "agx-orin", hz=10).holds is False
    assert planned("openvla-7b", "bf16", "agx-orin").holds is None


# Suggestions


@pytest.mark.parametrize(
    ("name", "bits", "where", "hz"),
    [
        ("openvla-7b", "bf16", "orin-nano-8gb", None),
        ("openvla-7b", "bf16", "orin-nx-16gb", None),
        ("openvla-7b", "fp8", "agx-orin", None),
        ("pi05", "fp16", "orin-nano-8gb", 30.0),
        ("openvla-oft-7b", "bf16", "agx-orin-32gb", 10.0),
        ("pi0", "bf16", "orin-nano-4gb", 20.0),
        ("pi0", "bf16", "agx-orin-64gb", 100.0),
    ],
)
def test_applied_suggestions_make_the_plan_possible(name: str, bits: str, where: str, hz: float | None) -> None:
    found = planned(name, bits, where, hz)
    assert not found.possible
    suggestions = suggest(found, hz)
    assert suggestions
    for suggestion in suggestions:
        after = plan(suggestion.setting, hz)
        assert after.prediction.memory.fits, suggestion.text
        assert not after.refusals, suggestion.text
        assert after.holds is not False, suggestion.text
    assert shortfall(found, suggestions, hz) is None


def test_no_suggestion_where_none_is_needed() -> None:
    assert suggest(planned("smolvla-450m", "bf16", "agx-orin", 10.0), 10.0) == []


def test_rates_that_nothing_holds_are_told() -> None:
    found = planned("openvla-7b", "bf16", "orin-nx-16gb", 10.0)
    suggestions = suggest(found, 10.0)
    assert all(plan(suggestion.setting).possible for suggestion in suggestions)  # it fits at least
    missing = shortfall(found, suggestions, 10.0)
    assert missing is not None
    assert re.match(r"no change holds 10 Hz on orin-nx-16gb: int4 with 95% .* still takes \d+ ms of the 100", missing)


def test_the_slower_mode_is_the_first_thing_to_change() -> None:
    found = plan(setting("smolvla-450m", "bf16", "orin-nano-8gb", "15W"), 50.0)
    assert suggest(found, 50.0)[0].text == "set the power mode MAXN_SUPER (nvpmodel)"


def test_fewer_steps_and_one_engine_at_a_time() -> None:
    texts = [suggestion.text for suggestion in suggest(planned("pi0", "bf16", "agx-orin-64gb", 60.0), 60.0)]
    assert any(re.match(r"\d flow steps instead of 10", text) for text in texts)
    found = planned("openvla-7b", "bf16", "orin-nx-16gb")
    (one,) = [suggestion for suggestion in suggest(found, None) if suggestion.setting.sequential]
    after = predict(one.setting)
    assert after.memory.peak < found.prediction.memory.peak
    assert after.parts["reading"] == pytest.approx(1e3 * found.prediction.memory.weights / 2e9)


def test_pruned_shapes_are_those_of_rlrc_prune() -> None:
    """The bytes that are suggested, against what the compressor counts for the shape that this ratio leaves."""
    pytest.importorskip("torch")
    from rlrc.compressor.prune import cost
    from rlrc.compressor.prune.allocation import PruneScope, allocate_uniformly

    known = geometries.geometry("openvla-7b")
    dense = build_on_meta(known.policy, known.towers)
    place = PruneScope(dense, "decoder", range(1, 31), 32)
    cut = prune(setting("openvla-7b", "int4", "orin-nano-8gb"), 0.7)
    ours = memory_model.predict(cut.work, cut.precision, cut.device, 1).weights
    theirs = cost.weight_bytes(build_on_meta(known.policy, allocate_uniformly(place)(0.7)))
    assert ours == pytest.approx(theirs, rel=0.01)


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["jetson", "plan", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_geometrys_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--geometry", "openvla-7b", "--precision", "int4", "--device", "agx-orin-64gb", "--json")
    code, printed, _ = run(capsys, *arguments)
    values = json.loads(printed)
    assert code == 0
    assert {"latency_ms", "peak_bytes", "parts", "fits", "refusals"} <= set(values)
    assert list(values["parts"]) == ["preprocess", "vision", "prefill", "decode"]
    assert values["latency_ms"] == pytest.approx(sum(values["parts"].values()))
    assert values["fits"]
    assert values["refusals"] == []
    assert values["stack"] is None
    assert values["assumptions"]
    assert values["energy_j"] == pytest.approx(0.6 * 60 * values["latency_ms"] / 1e3)


def test_a_refused_geometry_is_still_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "--geometry", "openvla-7b", "--precision", "fp8", "--device", "agx-orin", "--json")
    values = json.loads(printed)
    assert code == 0
    assert values["latency_ms"] > 0
    assert "SM 8.9" in values["refusals"][0]
    assert values["suggestions"]


def test_an_artifacts_plan(
    capsys: pytest.CaptureFixture[str], tiny_artifact: Path, tiny_int4_artifact: Path, tiny_manifest: Manifest
) -> None:
    code, printed, _ = run(capsys, str(tiny_int4_artifact), "--device", "orin-nano", "--hz", "20", "--json")
    values = json.loads(printed)
    assert (code, values["precision"], values["holds"]) == (0, "int4", True)
    code, printed, _ = run(capsys, str(tiny_artifact), "--device", "orin-nano")
    assert code == 0
    for told in ("latency", "fits", "engine build", "energy", "assumed: 1 camera of 32 x 32 pixels", "prefill"):
        assert told in printed
    code, printed, _ = run(capsys, str(tiny_artifact), "--device", "orin-nano", "--hz", "100000", "--json")
    assert code == 1  # it does not hold the rate
    assert json.loads(printed)["holds"] is False
    code, printed, _ = run(capsys, str(tiny_artifact), "--device", "agx-orin", "--precision", "fp8")
    assert code == 1
    assert "refused: fp8 needs tensor cores" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected either an artifact or --geometry, found both or neither"),
        (("--geometry", "pi0"), "expected --device NAME, found none; rlrc jetson devices lists them"),
        (("--geometry", "pi9", "--device", "thor"), "expected one of the geometries openvla-7b, .*, found 'pi9'"),
        (("--geometry", "pi0", "--device", "pi"), "expected a device of orin-nano-4gb, .*, found 'pi'"),
        (("--geometry", "pi0", "--device", "thor", "--mode", "5W"), "expected a mode of MAXN for thor-t5000"),
        (("--geometry", "pi0", "--device", "cpu", "--mode", "5W"), "expected no --mode for cpu, found 5W"),
        (("--geometry", "pi0", "--device", "thor", "--precision", "int3"), "expected a precision of fp32"),
        (("--geometry", "pi0", "--device", "thor", "--hz", "0"), "expected a positive --hz, found 0"),
        (("--geometry", "pi0", "--device", "thor", "--hz", "nan"), "expected a positive --hz, found nan"),
        (("nowhere", "--device", "thor"), "expected an artifact folder at nowhere, found nothing"),
    ],
)
def test_bad_requests_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, printed, complaint = run(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert re.match(f"rlrc: error: {message}", complaint)
    assert complaint.count("\n") == 1


NO_TORCH = """
import json, sys
from rlrc.runtime import cli
for arguments in (["plan", "--geometry", "pi05", "--device", "thor", "--json"], ["devices"], ["calibration"]):
    assert cli.main(["jetson", *arguments]) == 0
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_planning_needs_neither_torch_nor_an_engine() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "numpy" in imported
    assert not imported & {"torch", "onnx", "onnxruntime", "transformers", "safetensors", "tensorrt"}


# This machine


@pytest.mark.parametrize("precision_name", ["fp32", "fp16", "int8"])
def test_peak_memory_on_this_machine(
    precision_name: str, tiny_artifact: Path, tmp_path: Path, make_pupil: Callable[[], Any]
) -> None:
    """An exported artifact's peak resident memory, measured, within a tenth."""
    pytest.importorskip("onnx")
    from rlrc import artifact as artifacts
    from rlrc.benchmarks.measure import memory
    from rlrc.exporters.export import export
    from rlrc.jetson.model import probe
    from rlrc.jetson.model.plan import of_artifact

    out = tmp_path / "exported"
    export(artifacts.load(tiny_artifact), out, precision=precision_name, tolerance=10.0)
    here = replace(MACHINE, sm=None, peaks={"fp32": 1e11, "int8": 1e11}, watts=None)
    exported = of_artifact(artifacts.load(out), None, here, Load(), None)
    assert exported.precision.name == precision_name
    predicted = predict(replace(exported, base=probe.imported_bytes())).memory.peak
    assert predicted == pytest.approx(memory.measure(out, inferences=3)["running"]["peak"], rel=0.1)


def test_every_number_of_a_plan_is_finite() -> None:
    for name in geometries.load_geometries():
        for bits in precision.PRECISIONS:
            found = planned(name, bits, "thor")
            values = [
                *found.prediction.parts.values(),
                found.prediction.joules,
                *found.prediction.memory.record().values(),
            ]
            assert np.isfinite(np.array(values, float)).all()
            assert min(found.prediction.parts.values()) > 0
