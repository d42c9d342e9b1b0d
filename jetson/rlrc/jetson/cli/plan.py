"""The commands devices, plan and calibration, which need no device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc.errors import UserError
from rlrc.jetson.model import calibration, devices, probe
from rlrc.jetson.model.plan import Plan as Planned
from rlrc.jetson.model.plan import Setting, of_artifact, of_geometry, plan, record
from rlrc.jetson.model.roofline import BANDWIDTH, COMPUTE, SIDE, Stack
from rlrc.jetson.model.suggest import shortfall, suggest
from rlrc.jetson.model.work import Load
from rlrc.tables import plain_console, print_rows, print_table

KINDS = ("fp32", "fp16", "int8", "fp8", "fp4")


@dataclass(frozen=True)
class ListDevices:
    """List the modules in each power mode: memory, bandwidth, dense throughput, JetPack."""

    cpu: bool = False
    """also measure this machine, for a few seconds"""
    json: bool = False
    """print the table as JSON, with the source of every figure"""

    def run(self) -> None:
        table = devices.table()
        found = [devices.device(name, mode.name) for name, module in table.devices.items() for mode in module.modes]
        found += [probe.this_machine()] if self.cpu else []
        if self.json:
            print(json.dumps({**asdict(table), "measured" if self.cpu else "modes": [asdict(one) for one in found]}))
            return
        console = plain_console()
        heads = "".join(f"{head:>7}" for head in ("W", "GiB", "GB/s", *KINDS))
        console.print(f"{'device':<15}{'mode':<11}{heads}  {'SM':<6}JetPack")
        for one in found:
            console.print(device_line(one))
        for name, jetpack in table.jetpacks.items():
            console.print(
                f"JetPack {name}: Jetson Linux {jetpack.linux}, Ubuntu {jetpack.ubuntu}, Python {jetpack.python}, "
                f"CUDA {jetpack.cuda}, TensorRT {jetpack.tensorrt}"
            )
        console.print("fp32 to fp4: dense, in 10^12 operations a second. GiB: what Linux has. Sources: --json")


@dataclass(frozen=True)
class PredictPlan:
    """Predict latency by part, peak memory and energy of a policy on a device, and suggest changes if it is too slow.

    Exit code 1 if an artifact's plan does not fit, is refused, or does not hold the rate.
    """

    path: Positional[Path | None] = None
    """the artifact"""
    geometry: str | None = None
    """instead of an artifact: openvla-7b, openvla-oft-7b, pi0, pi05, smolvla-450m or act"""
    device: str = ""
    """device: a name from rlrc jetson devices, or cpu for this machine"""
    mode: str | None = None
    """power mode of the device (default: the fastest)"""
    precision: str | None = None
    """fp32, fp16, bf16, int8, w8 (8-bit weights only), fp8, int4, w4a8, fp4 (default: the artifact's; bf16)"""
    hz: float | None = None
    """required control rate"""
    stack: Stack | None = None
    """compiled kernels (TensorRT, MLC) or plain ones (llama.cpp, eager PyTorch); default: compiled for weights of less
    than 16 bits, else the mean of both"""
    cameras: int | None = None
    """number of cameras (default: all of the policy)"""
    prompt_tokens: int | None = None
    """length of the prompt"""
    steps: int | None = None
    """flow steps (default: the policy's)"""
    json: bool = False
    """print everything as JSON"""

    def run(self) -> int:
        if (self.path is None) == (self.geometry is None):
            raise UserError("expected either an artifact or --geometry, found both or neither; give one of them")
        if not self.device:
            raise UserError("expected --device NAME, found none; rlrc jetson devices lists them")
        if self.hz is not None and not (isfinite(self.hz) and self.hz > 0):
            raise UserError(f"expected a positive --hz, found {self.hz:g}; give the rate of the control loop")
        found = plan(self._setting(), self.hz)
        suggestions = suggest(found, self.hz)
        texts = [suggestion.text for suggestion in suggestions]
        if (missing := shortfall(found, suggestions, self.hz)) is not None:
            texts.append(missing)
        if self.json:
            print(json.dumps(record(found, texts), indent=1))
        else:
            describe(found, texts, self.hz, plain_console())
        return 0 if self.geometry is not None or found.possible else 1

    def _setting(self) -> Setting:
        local = self.device.lower() == devices.CPU
        if local and self.mode is not None:
            raise UserError(f"expected no --mode for {devices.CPU}, found {self.mode}; leave it out")
        where = probe.this_machine() if local else devices.device(self.device, self.mode)
        load = Load(self.cameras, self.prompt_tokens, self.steps)
        if self.geometry is not None:
            setting = of_geometry(self.geometry, self.precision, where, load, self.stack)
        else:
            assert self.path is not None
            setting = of_artifact(artifacts.load(self.path, verify=()), self.precision, where, load, self.stack)
        return replace(setting, base=probe.imported_bytes()) if local else setting


@dataclass(frozen=True)
class ShowCalibration:
    """List the published measurements of the calibration, each with its prediction by a fit to all others."""

    json: bool = False
    """print everything as JSON"""

    def run(self) -> None:
        rows, fitted = calibration.leave_one_out(), calibration.fit()
        groups = {"listed": [row for row in rows if row.measurement.listed], "all": rows}
        summaries = {
            name: {
                "own_stack": calibration.summary([row.own_error for row in chosen]),
                "stack_untold": calibration.summary([row.untold_error for row in chosen]),
            }
            for name, chosen in groups.items()
        }
        if self.json:
            predictions = [asdict(row) | {"own_error": row.own_error, "untold_error": row.untold_error} for row in rows]
            print(json.dumps({"fit": asdict(fitted), "summary": summaries, "rows": predictions}, indent=1))
            return
        table = Table(
            "policy", "device", "precision", "program", "measured\nms", "own stack\nms", "", "untold\nms", "", "listed"
        )
        for column in table.columns[4:9]:
            column.justify = "right"
        for row in rows:
            one = row.measurement
            table.add_row(
                one.geometry,
                one.device,
                one.precision,
                one.program,
                f"{one.ms:,.0f}",
                f"{row.own_ms:,.0f}",
                f"{row.own_error:+.0%}",
                f"{row.untold_ms:,.0f}",
                f"{row.untold_error:+.0%}",
                "yes" if one.listed else "",
            )
        console = plain_console()
        print_table(table, console)
        console.print("Every prediction is by a fit without that measurement.")
        for name, both in summaries.items():
            text = "; ".join(
                f"{which.replace('_', ' ')}: median error {of['median_error']:.1%}, worst {of['worst_ratio']:.2f}x"
                for which, of in both.items()
            )
            console.print(f"{name} ({len(groups[name])}): {text}")
        console.print(
            f"fit to all: compiled {fitted.compiled:.2f}, plain {fitted.plain:.2f} of the peak, side {fitted.side:g}, "
            f"bandwidth {fitted.bandwidth:.2f}; in use: {COMPUTE['compiled']:.2f}, {COMPUTE['plain']:.2f}, {SIDE:g}, "
            f"{BANDWIDTH:.2f}"
        )


def device_line(one: devices.Device) -> str:
    module = devices.table().devices.get(one.name)
    numbers = [f"{one.watts:g}" if one.watts else "-", f"{one.visible_bytes / 2**30:.1f}", f"{one.bandwidth / 1e9:.1f}"]
    numbers += [f"{one.peaks[kind] / 1e12:.{1 if one.sm else 2}f}" if kind in one.peaks else "-" for kind in KINDS]
    jetpacks = "" if module is None else ", ".join(module.jetpacks)
    return f"{one.name:<15}{one.mode:<11}{''.join(f'{number:>7}' for number in numbers)}  {one.sm or '-':<6}{jetpacks}"


def describe(found: Planned, suggestions: list[str], hz: float | None, console: Console) -> None:
    prediction, setting = found.prediction, found.setting
    memory, device = prediction.memory, setting.device
    low, high = prediction.bounds
    between = "" if low == high else f" (compiled kernels {low:,.1f}, plain ones {high:,.1f})"
    rows = {
        "policy": f"{setting.name}, {setting.precision.name}",
        "device": f"{device.title}, {device.mode}",
        "latency": f"{prediction.latency_ms:,.1f} ms a chunk of {setting.horizon}{between}",
        "memory": f"{_gb(memory.peak)} at its peak, {_gb(memory.visible - memory.reserve)} there: "
        + ("fits" if memory.fits else f"{_gb(memory.excess)} too much"),
    }
    if memory.building:
        rows["engine build"] = f"{_gb(memory.building)} at its peak: " + (
            "fits" if memory.builds else "does not fit; rlrc export --to gguf needs none"
        )
    if prediction.joules is not None:
        rows["energy"] = f"{prediction.joules:.2f} J a chunk"
    if found.deadline_ms is not None:
        verdict = "holds" if found.holds else "does not hold"
        rows["rate"] = f"{hz:g} Hz: {verdict}; an inference may take {found.deadline_ms:,.1f} ms"
    print_rows(rows, console)
    table = Table("part", "ms")
    table.columns[1].justify = "right"
    for name, milliseconds in prediction.parts.items():
        table.add_row(name, f"{milliseconds:,.2f}")
    parts = Table("memory", "GB")
    parts.columns[1].justify = "right"
    for name, size in memory.record().items():
        parts.add_row(name, f"{size / 1e9:,.3f}")
    print_table(table, console)
    print_table(parts, console)
    for heading, lines in (
        ("refused", found.refusals),
        ("to change", tuple(suggestions)),
        ("assumed", found.assumptions),
    ):
        for line in lines:
            console.print(f"{heading}: {line}")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
