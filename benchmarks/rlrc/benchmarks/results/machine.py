"""Describe the class of the machine of a measurement, without host names and paths."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rlrc.runtime.board.jetson import power_mode

PACKAGES = ("rlrc", "numpy", "onnxruntime", "tokenizers", "pillow", "mujoco", "metaworld")


def describe(threads: int | None = None, root: Path = Path("/")) -> dict[str, Any]:
    """Device, processor, cores, memory, clocks, power mode, system and versions; None for unreadable values.

    ``root``: folder of the system's files.
    """
    memory = _match(root / "proc/meminfo", r"MemTotal:\s+(\d+) kB")
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {
        "device": (_read(root / "proc/device-tree/model") or platform.machine()).strip("\0\n "),
        "cpu": _match(root / "proc/cpuinfo", r"model name\s*: (.+)") or platform.processor() or platform.machine(),
        "cores": len(affinity) or os.cpu_count(),
        "affinity": ranges(affinity) or None,
        "threads": threads,
        "memory_gb": round(int(memory) / 2**20, 1) if memory else None,
        **clocks(root),
        "power_mode": power_mode(root),
        # The first two numbers only: a release such as 6.1.0-name can identify the builder of the kernel.
        "system": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def clocks(root: Path = Path("/")) -> dict[str, Any]:
    """Current ``governor`` and ``mhz`` [lowest, highest]; a virtual machine reports its nominal clock."""
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    governors = {governor for policy in policies if (governor := (_read(policy / "scaling_governor") or "").strip())}
    kilohertz = [int(text) for policy in policies if (text := (_read(policy / "scaling_cur_freq") or "").strip())]
    megahertz = [value / 1e3 for value in kilohertz]
    if not megahertz:
        megahertz = [float(text) for text in re.findall(r"cpu MHz\s*: ([\d.]+)", _read(root / "proc/cpuinfo") or "")]
    return {
        "governor": ", ".join(sorted(governors)) or None,
        "mhz": [round(min(megahertz)), round(max(megahertz))] if megahertz else None,
    }


def unified_memory(root: Path = Path("/")) -> bool:
    """Whether CPU and GPU share memory, as on a Jetson."""
    return "Jetson" in (_read(root / "proc/device-tree/model") or "")


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5", the format of Linux for processors."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def command(arguments: Sequence[str] | None = None) -> str:
    """The command line of this process, with paths relative to the working directory, or their names only."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return " ".join(["rlrc", *(_shorten(argument) for argument in arguments)])


def _shorten(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(Path.cwd())
    return option + equals + (str(path.relative_to(Path.cwd())) if inside else path.name)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _match(path: Path, pattern: str) -> str | None:
    found = re.search(pattern, _read(path) or "")
    return found.group(1).strip() if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
