"""Checks a board by its files: one finding for each line, with what to do if something is wrong.

Everything here is read from files below a root, so that recorded trees can be checked. Checks that need a process on
the board (imports, limits, groups) are in doctor_live.py. On other machines, findings that need a Jetson say so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlrc.jetson.model import devices
from rlrc.jetson.model.devices import JetPack
from rlrc.runtime.board.jetson import (
    below,
    gpu_node,
    meminfo,
    power_mode,
    power_modes,
    read_number,
    read_sysfs,
    read_text,
)
from rlrc.runtime.board.monitor import is_jetson

GIB = 2**30
LEAST_MEMORY, LEAST_CMA = GIB, 32 * 2**20
MARGIN = 10.0  # degrees below the lowest trip point
LIBRARIES = ("usr/lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu/nvidia", "usr/lib/aarch64-linux-gnu/tegra")
# NVIDIA's numbers of the modules, in /proc/device-tree/compatible (Jetson Linux Developer Guide, "Module and carrier
# board"; the T4000's was not found).
MODULES = {
    "p3767-0000": "orin-nx-16gb",
    "p3767-0001": "orin-nx-8gb",
    "p3767-0003": "orin-nano-8gb",
    "p3767-0004": "orin-nano-4gb",
    "p3767-0005": "orin-nano-8gb",
    "p3701-0000": "agx-orin-32gb",
    "p3701-0004": "agx-orin-32gb",
    "p3701-0005": "agx-orin-64gb",
    "p3834-0008": "thor-t5000",
}

State = Literal["ok", "advice", "fix", "none"]


@dataclass(frozen=True)
class Finding:
    """``state``: ok; advice: works, but could be better; fix: does not work; none: does not exist here. ``todo``: what
    to do.
    """

    name: str
    state: State
    found: str
    todo: str = ""


def examine(root: Path = Path("/")) -> list[Finding]:
    """All findings from files, in reading order."""
    checks: tuple[Callable[[Path], Finding], ...] = (
        board,
        module,
        jetpack,
        ubuntu,
        python,
        cuda,
        tensorrt,
        libraries,
        mode,
        clocks,
        heat,
        supply,
        memory,
        swap,
        cma,
        cameras,
    )
    return [check(root) for check in checks]


def board(root: Path) -> Finding:
    model = read_text(below(root, "proc/device-tree/model"))
    if is_jetson(root):
        return Finding("board", "ok", model or "a Jetson without a name")
    return Finding("board", "none", f"no Jetson{f': {model}' if model else ''}")


def module(root: Path) -> Finding:
    found = device(root)
    if found is None:
        return Finding("module", "none", "none of those that rlrc jetson devices lists")
    return Finding("module", "ok", f"{found}: {devices.table().devices[found].title}")


def device(root: Path) -> str | None:
    """The module's name in rlrc jetson devices."""
    compatible = read_text(below(root, "proc/device-tree/compatible")) or ""
    return next((name for number, name in MODULES.items() if number in compatible), None)


def release(root: Path) -> str | None:
    """Jetson Linux's, as R36.4.4."""
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", read_text(below(root, "etc/nv_tegra_release")) or "")
    return None if found is None else f"R{found[1]}.{found[2]}"


def known_jetpack(root: Path) -> tuple[str, JetPack] | None:
    """The JetPack of the release, else the known one of the same major release."""
    found = release(root)
    if found is None:
        return None
    known = list(devices.table().jetpacks.items())
    same = [(name, one) for name, one in known if f"{found}.".startswith(f"{one.linux}.")]
    near = [(name, one) for name, one in known if one.linux.partition(".")[0] == found.partition(".")[0]]
    return next(iter([*same, *near]), None)


def jetpack(root: Path) -> Finding:
    found, known = release(root), known_jetpack(root)
    if found is None:
        return Finding("JetPack", "none", "no Jetson Linux")
    package = packages(root).get("nvidia-jetpack")
    text = f"{found}{f', package {package}' if package else ''}"
    if known is None:
        supported = ", ".join(f"{name} ({one.linux})" for name, one in devices.table().jetpacks.items())
        return Finding("JetPack", "fix", text, f"install one of JetPack {supported}")
    return Finding("JetPack", "ok", f"{text}, taken as JetPack {known[0]}")


def ubuntu(root: Path) -> Finding:
    number = re.search(r'VERSION_ID="?([\d.]+)', read_text(below(root, "etc/os-release")) or "")
    name = re.search(r'^NAME="?([^"\n]+)', read_text(below(root, "etc/os-release")) or "", re.MULTILINE)
    found = f"{name[1] if name else 'unknown'} {number[1] if number else ''}".strip()
    known = known_jetpack(root)
    if known is None:
        return Finding("system", "ok", found)
    return _expected("system", found, f"Ubuntu {known[1].ubuntu}", "install the JetPack again")


def python(root: Path) -> Finding:
    found = re.search(
        r"3\.\d+", below(root, "usr/bin/python3").name
    )  # python3 -> (/etc/alternatives/... ->) python3.10
    known = known_jetpack(root)
    if found is None:
        return Finding("system's Python", "none", "none at /usr/bin/python3")
    if known is None:
        return Finding("system's Python", "ok", found[0])
    todo = "link /usr/bin/python3 back: TensorRT's module is made for the system's own"
    return _expected("system's Python", found[0], known[1].python, todo)


def cuda(root: Path) -> Finding:
    version = _cuda_version(read_text(below(root, "usr/local/cuda/version.json")) or "")
    known = known_jetpack(root)
    if known is None:
        return Finding("CUDA", "none" if version is None else "ok", version or "none at /usr/local/cuda")
    todo = "sudo apt-get install nvidia-jetpack"
    return _expected("CUDA", version or "none at /usr/local/cuda", known[1].cuda, todo)


def _cuda_version(text: str) -> str | None:
    """Of a version.json: {"cuda": {"version": "12.6.11"}}; None for anything else."""
    try:
        found = json.loads(text)
        for key in ("cuda", "version"):
            found = found.get(key) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def tensorrt(root: Path) -> Finding:
    version = next((version for name, version in packages(root).items() if re.fullmatch(r"libnvinfer\d+", name)), None)
    known = known_jetpack(root)
    if known is None:
        return Finding("TensorRT", "none" if version is None else "ok", version or "not installed as a package")
    todo = "sudo apt-get install tensorrt python3-libnvinfer"
    return _expected("TensorRT", version or "not installed", known[1].tensorrt, todo)


def _expected(name: str, found: str, expected: str, todo: str) -> Finding:
    """ok if the version begins with the expected numbers."""
    if re.match(rf"{re.escape(expected)}(?!\d)", found):
        return Finding(name, "ok", found)
    return Finding(name, "fix", f"{found}, expected {expected}", todo)


def libraries(root: Path) -> Finding:
    """Libraries of the driver, CUDA, cuDNN and TensorRT, in the major versions of this JetPack."""
    known = known_jetpack(root)
    if known is None:
        return Finding("libraries", "none", "not checked here: no JetPack")
    runtime, engine = known[1].cuda.partition(".")[0], known[1].tensorrt.partition(".")[0]
    wanted = ["libcuda.so.1", f"libcudart.so.{runtime}", f"libcublas.so.{runtime}", "libcudnn.so.9"]
    wanted += [f"libnvinfer.so.{engine}", f"libnvonnxparser.so.{engine}"]
    targets = below(root, "usr/local/cuda/targets").glob("*")
    places = [*LIBRARIES, "usr/local/cuda/lib64", *(f"usr/local/cuda/targets/{one.name}/lib" for one in targets)]
    missing = [name for name in wanted if not any(below(root, f"{place}/{name}").exists() for place in places)]
    if missing:
        return Finding("libraries", "fix", f"missing {', '.join(missing)}", "sudo apt-get install nvidia-jetpack")
    return Finding("libraries", "ok", ", ".join(wanted))


def packages(root: Path) -> dict[str, str]:
    """Installed Debian packages and their versions."""
    found = {}
    for entry in (read_text(below(root, "var/lib/dpkg/status")) or "").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", entry, re.MULTILINE))
        if "Package" in fields and fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields.get("Version", "")
    return found


def mode(root: Path) -> Finding:
    found, modes = power_mode(root), power_modes(root)
    if found is None:
        return Finding("power mode", "none", "no nvpmodel")
    fastest = max(modes, key=lambda number: _speed(modes[number])) if modes else None
    if fastest is None or modes[fastest] == found:
        return Finding("power mode", "ok", found)
    return Finding("power mode", "advice", f"{found}, {modes[fastest]} is faster", f"sudo nvpmodel -m {fastest}")


def _speed(name: str) -> tuple[bool, int]:
    watts = re.search(r"(\d+)W", name)
    return name.startswith("MAXN"), int(watts[1]) if watts else 0


def clocks(root: Path) -> Finding:
    node = gpu_node(root)
    if node is None:
        return Finding("clocks", "none", "no GPU that scales its clock")
    low, high = read_number(node / "min_freq"), read_number(node / "max_freq")
    if low is None or high is None:
        return Finding("clocks", "none", f"{node.name} does not report its clock")
    if low == high:
        return Finding("clocks", "ok", f"GPU fixed at {high / 1e6:.0f} MHz")
    todo = "sudo jetson_clocks, before measuring and for a steady rate"
    return Finding("clocks", "advice", f"GPU between {low / 1e6:.0f} and {high / 1e6:.0f} MHz", todo)


def heat(root: Path) -> Finding:
    found, trip = read_sysfs(root), _lowest_trip(root)
    if found.hottest is None:
        return Finding("heat", "none", "no thermal zone")
    text = f"{found.hottest:.1f} °C{f', {trip:.1f} is the limit' if trip is not None else ''}"
    todo = "better cooling, a faster fan (/etc/nvfancontrol.conf) or a slower power mode"
    if found.throttled:
        return Finding("heat", "fix", f"{text}; throttled: {', '.join(found.throttled)}", todo)
    if trip is not None and found.hottest > trip - MARGIN:
        return Finding("heat", "advice", text, todo)
    return Finding("heat", "ok", text)


def _lowest_trip(root: Path) -> float | None:
    """The lowest throttling or shutdown temperature of the junction, else of any zone, fans excepted."""
    found = {}
    for file in root.glob("sys/class/thermal/thermal_zone*/trip_point_*_type"):
        degrees = read_number(file.with_name(file.name.replace("_type", "_temp")))
        if read_text(file) in ("passive", "hot", "critical") and degrees is not None and degrees > 0:
            found[f"{read_text(file.parent / 'type')} {file.name}"] = degrees / 1e3
    junction = [degrees for name, degrees in found.items() if name.startswith("tj")]
    return min(junction or list(found.values()), default=None)


def supply(root: Path) -> Finding:
    events = {kind: number for kind, number in read_sysfs(root).overcurrent.items() if number}
    if not read_sysfs(root).overcurrent:
        return Finding("supply", "none", "no counter of over-currents")
    if not events:
        return Finding("supply", "ok", "no under-voltage, no over-current since the start")
    text = ", ".join(f"{kind} {number} times" for kind, number in events.items())
    return Finding("supply", "advice", text, "a stronger power supply, a shorter cable, or a power mode with a limit")


def memory(root: Path) -> Finding:
    values = meminfo(root)
    if not {"MemAvailable", "MemTotal"} <= values.keys():
        return Finding("memory", "none", "/proc/meminfo does not report it")
    found = f"{values['MemAvailable'] / GIB:.1f} of {values['MemTotal'] / GIB:.1f} GiB free"
    if values["MemAvailable"] < LEAST_MEMORY:
        return Finding("memory", "fix", found, "end other programs; sudo systemctl isolate multi-user.target")
    if is_jetson(root) and values["MemAvailable"] < values["MemTotal"] / 2:
        return Finding("memory", "advice", found, "without a desktop: sudo systemctl set-default multi-user.target")
    return Finding("memory", "ok", found)


def swap(root: Path) -> Finding:
    """The loop's memory is locked and its service may not swap, so used swap means that memory is short."""
    rows = re.findall(r"^(\S+)\s+\S+\s+\d+\s+(\d+)", read_text(below(root, "proc/swaps")) or "", re.MULTILINE)
    if not rows:
        return Finding("swap", "ok", "none")
    used = sum(int(size) for _, size in rows) * 1024
    text = f"{used / GIB:.1f} GiB used on {', '.join(name for name, _ in rows)}"
    if not used:
        return Finding("swap", "ok", text)
    return Finding("swap", "advice", text, "end other programs, then sudo swapoff -a")


def cma(root: Path) -> Finding:
    values = meminfo(root)
    if not values.get("CmaTotal") or "CmaFree" not in values:
        return Finding("CMA", "none", "no contiguous memory is reserved")
    found = f"{values['CmaFree'] >> 20} of {values['CmaTotal'] >> 20} MiB free"
    if values["CmaFree"] < LEAST_CMA and is_jetson(root):
        todo = "cameras and decoders need it: cma=512M behind APPEND in /boot/extlinux/extlinux.conf, and restart"
        return Finding("CMA", "advice", found, todo)
    return Finding("CMA", "ok", found)


def cameras(root: Path) -> Finding:
    nodes = sorted(root.glob("sys/class/video4linux/video*"), key=lambda node: (len(node.name), node.name))
    if not nodes:
        return Finding("cameras", "none", "no /dev/video*")
    return Finding("cameras", "ok", "; ".join(f"/dev/{node.name} {read_text(node / 'name')}" for node in nodes))
