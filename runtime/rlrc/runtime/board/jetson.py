"""A Jetson's sensors without NVML: tegrastats, files under /sys and /proc, and jetson-stats.

All three become a ``Reading``; values that a source does not have are None or missing. The format of tegrastats changes
between releases (tests/data/jetson/tegrastats.txt has recorded lines of JetPack 3 to 7). Needs the standard library
only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

MB = 2**20
# Sets of rails whose sum is the module's power; the first complete set counts. Orin Nano and NX, Xavier NX, TX2;
# Thor; Nano; AGX Orin (VIN_SYS_5V0 feeds its VDDQ); Thor by its files, which have no VIN; AGX Xavier.
TOTALS = (
    ("VDD_IN",),
    ("VIN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
NO_SENSOR = ("pmic",)  # a constant
OFF = -200.0  # degrees: sensors that are powered down report -256
GPU_NODE = re.compile(r"gpu(?!-nvd)|ga10b|gv11b|gp10b")
THROTTLES = re.compile(r"-alert$|^cpufreq-|^devfreq-.*gpu")
OVERCURRENT = {"oc1": "under-voltage", "oc2": "average current", "oc3": "peak current"}


@dataclass(frozen=True)
class Reading:
    """One moment. ``rails`` in watts; loads from 0 to 1, ``cpu_load`` of the running cores; ``celsius`` by zone,
    in lower case; memory in bytes; ``throttled``: what heat throttles now; ``overcurrent``: events since boot, by kind.
    """

    rails: Mapping[str, float] = field(default_factory=dict)
    gpu_load: float | None = None
    gpu_mhz: float | None = None
    cpu_load: float | None = None
    cpu_mhz: float | None = None
    emc_load: float | None = None
    celsius: Mapping[str, float] = field(default_factory=dict)
    memory_used: int | None = None
    memory_total: int | None = None
    swap_used: int | None = None
    throttled: tuple[str, ...] = ()
    overcurrent: Mapping[str, int] = field(default_factory=dict)

    @property
    def watts(self) -> float | None:
        """The power of the whole module."""
        return module_total(self.rails)

    @property
    def hottest(self) -> float | None:
        """The junction's temperature, or that of the hottest zone."""
        return self.celsius.get("tj", max(self.celsius.values(), default=None))

    def merge(self, other: Reading) -> Reading:
        """This reading, with missing values taken from the other."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Reading(
            **{name: value if value or value == 0 else getattr(other, name) for name, value in values.items()}
        )


def module_total(rails: Mapping[str, float]) -> float | None:
    """The whole module's watts or joules from those of its rails; None if a rail is missing."""
    for names in TOTALS:
        if all(name in rails for name in names):
            return sum(rails[name] for name in names)
    return None


def parse_tegrastats(line: str) -> Reading:
    """Parses a line of tegrastats of any release; any other line is an empty reading."""
    gpu = re.search(r"\bGR3D(?:_FREQ)? (?:(\d+)%)?(?:@\[?([\d,]+)\]?)?", line)
    emc = re.search(r"\bEMC(?:_FREQ)? (\d+)%", line)
    memory, swap = re.search(r"\bRAM (\d+)/(\d+)MB", line), re.search(r"\bSWAP (\d+)/\d+MB", line)
    cpu_load, cpu_mhz = _processors(line)
    return Reading(
        rails=_rails(line),
        gpu_load=int(gpu[1]) / 100 if gpu and gpu[1] else None,
        gpu_mhz=float(max(map(int, gpu[2].split(",")))) if gpu and gpu[2] else None,
        cpu_load=cpu_load,
        cpu_mhz=cpu_mhz,
        emc_load=int(emc[1]) / 100 if emc else None,
        celsius=_zones(re.findall(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C", line), 1.0),
        memory_used=int(memory[1]) * MB if memory else None,
        memory_total=int(memory[2]) * MB if memory else None,
        swap_used=int(swap[1]) * MB if swap else None,
    )


def _processors(line: str) -> tuple[float | None, float | None]:
    """Load, and the fastest clock in MHz, from ``CPU [7%@1224,off]``; before JetPack 4 ``cpu [7%,0%]@1224``."""
    found = re.search(r"\bCPU \[([^\]]*)\](?:@(\d+))?", line, re.IGNORECASE)
    if found is None:
        return None, None
    loads = [int(load) / 100 for load in re.findall(r"(\d+)%", found[1])]
    clocks = [int(clock) for clock in re.findall(r"@(\d+)", found[1])] + ([int(found[2])] if found[2] else [])
    return sum(loads) / len(loads) if loads else None, float(max(clocks)) if clocks else None


def _rails(line: str) -> dict[str, float]:
    """Watts from ``VDD_IN 5313mW/5313mW``: now and average. JetPack 7.2 adds the peak; JetPack 4 has no unit."""
    number = r"(-?\d+)(?:mW(?:/-?\d+mW){0,2}|/-?\d+)(?!\S)"
    return {name: int(now) / 1e3 for name, now in re.findall(rf"\b([A-Z][A-Z0-9_]*) {number}", line) if name != "NC"}


def _zones(named: list[tuple[str, str]], unit: float) -> dict[str, float]:
    degrees = {re.sub(r"[-_]therm(al)?$", "", name.lower()): float(text) * unit for name, text in named}
    return {name: value for name, value in degrees.items() if name not in NO_SENSOR and value > OFF}


# Files


def read_sysfs(root: Path = Path("/")) -> Reading:
    """Reads /sys and /proc under ``root``. Other machines than Jetsons have memory, clocks and zones only."""
    memory = meminfo(root)
    gpu = gpu_node(root)
    clocks = [read_number(file) for file in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    known = [clock for clock in clocks if clock is not None]
    load = None if gpu is None else read_number(gpu / "device/load")
    hertz = None if gpu is None else read_number(gpu / "cur_freq")
    zones = [
        (read_text(zone / "type"), read_text(zone / "temp")) for zone in root.glob("sys/class/thermal/thermal_zone*")
    ]
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    return Reading(
        rails=dict(_ina3221(root)),
        gpu_load=None if load is None else load / 1000,
        gpu_mhz=None if hertz is None else hertz / 1e6,
        cpu_mhz=max(known) / 1e3 if known else None,
        celsius=_zones([(kind, degrees) for kind, degrees in zones if kind and degrees], 1e-3),
        memory_used=None if total is None or available is None else total - available,
        memory_total=total,
        swap_used=memory["SwapTotal"] - memory["SwapFree"] if {"SwapTotal", "SwapFree"} <= memory.keys() else None,
        throttled=throttled(root),
        overcurrent=overcurrent(root),
    )


def _ina3221(root: Path) -> Iterator[tuple[str, float]]:
    """Watts of the three channels of each chip, from mV and mA. Channels 4 to 7 are shunt voltages."""
    for chip in hwmon(root, "ina3221"):
        for channel in (1, 2, 3):
            label = read_text(chip / f"in{channel}_label")
            volts, amperes = read_number(chip / f"in{channel}_input"), read_number(chip / f"curr{channel}_input")
            if label and label != "NC" and volts is not None and amperes is not None:
                yield label, volts * amperes / 1e6


def hwmon(root: Path, name: str) -> list[Path]:
    """The monitors of a driver. Their numbers may change at every boot."""
    return [chip for chip in sorted(root.glob("sys/class/hwmon/hwmon*")) if read_text(chip / "name") == name]


def gpu_node(root: Path) -> Path | None:
    """The GPU's devfreq folder: 17000000.gpu (Orin), gpu-gpc-0 (Thor), 17000000.gv11b (Xavier)."""
    nodes = sorted(node for node in root.glob("sys/class/devfreq/*") if GPU_NODE.search(node.name))
    return nodes[0] if nodes else None


def throttled(root: Path) -> tuple[str, ...]:
    """Active cooling devices: a firmware alert, or a clock limited below its maximum."""
    devices = root.glob("sys/class/thermal/cooling_device*")
    active = {read_text(device / "type") or "" for device in devices if read_number(device / "cur_state")}
    return tuple(sorted(kind.removesuffix("-throttle-alert") for kind in active if THROTTLES.search(kind)))


def overcurrent(root: Path) -> dict[str, int]:
    """Overcurrent events since boot, by kind."""
    found = {}
    for chip in hwmon(root, "soctherm_oc"):
        for short, kind in OVERCURRENT.items():
            if (events := read_number(chip / f"{short}_event_cnt")) is not None:
                found[kind] = events
    return found


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes, by name."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", read_text(below(root, "proc/meminfo")) or "", re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}


def power_mode(root: Path = Path("/")) -> str | None:
    """The name of the active nvpmodel mode."""
    modes = power_modes(root)
    chosen = re.search(r"pmode:0*(\d+)", read_text(below(root, "var/lib/nvpmodel/status")) or "")
    return None if chosen is None else modes.get(int(chosen[1]), f"mode {chosen[1]}")


def power_modes(root: Path = Path("/")) -> dict[int, str]:
    """The names of this board's power modes, by number. The largest number is not the fastest."""
    text = read_text(below(root, "etc/nvpmodel.conf")) or ""
    return {int(number): name for number, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text)}


def below(root: Path, path: str) -> Path:
    """Resolves ``path`` on the machine whose root directory is ``root``, such as a mounted SD card.

    Links are followed as on that machine: absolute ones start at its root.
    """
    found, left = root, list(reversed(PurePosixPath(path).parts))
    for _ in range(1000):  # a limit for cyclic links
        if not left:
            break
        part = left.pop()
        if part == "..":
            found = found if found == root else found.parent
        elif part == "/":
            found = root
        elif (found / part).is_symlink():
            left += reversed(PurePosixPath((found / part).readlink()).parts)
        else:
            found /= part
    return root / path if left else found


def read_number(file: Path) -> int | None:
    text = read_text(file)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def read_text(file: Path) -> str | None:
    """A file's text; None if it is missing or cannot be read now: sensors that are powered down return EAGAIN.

    Unbuffered, because Python's buffered reader turns EAGAIN into another error.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        parts = []
        while part := os.read(handle, 1 << 16):
            parts.append(part)
        return b"".join(parts).decode(errors="replace").strip("\0\n ")
    except OSError:
        return None
    finally:
        os.close(handle)


# jetson-stats


def read_jtop(jetson: Any) -> Reading:
    """Reads jetson-stats' ``jtop``, the only source of Thor's GPU load.

    Power is in milliwatts, loads are in percent, clocks in kHz, memory in kB (its documentation, class jtop).
    """
    gpu: dict[str, Any] = next((jetson.gpu[name] for name in jetson.gpu), {})
    load, clock = gpu.get("status", {}).get("load"), gpu.get("freq", {}).get("cur")
    memory = jetson.memory["RAM"]
    zones = [(name, str(zone["temp"])) for name, zone in jetson.temperature.items() if zone.get("online", True)]
    return Reading(
        rails={name: rail["power"] / 1e3 for name, rail in jetson.power.get("rail", {}).items() if name != "NC"},
        gpu_load=None if load is None else load / 100,
        gpu_mhz=None if clock is None else clock / 1e3,
        celsius=_zones(zones, 1.0),
        memory_used=memory["used"] * 1024,
        memory_total=memory["tot"] * 1024,
    )
