"""What a measurement ran on, in words that identify the class of machine and nobody's workplace: no host names, no
paths."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rlrc.runtime.jetson_telemetry import power_mode

PACKAGES = ("rlrc", "numpy", "onnxruntime", "tokenizers", "pillow", "mujoco", "metaworld")


def describe(threads: int | None = None) -> dict[str, Any]:
    """Device, processor, cores, memory, frequency governor, system and versions; what cannot be read is None.

    Of a Jetson also nvpmodel's mode.
    """
    memory = _match(Path("/proc/meminfo"), r"MemTotal:\s+(\d+) kB")
    return {
        "device": (_read(Path("/proc/device-tree/model")) or platform.machine()).strip("\0\n "),
        "cpu": _match(Path("/proc/cpuinfo"), r"model name\s*: (.+)") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gb": round(int(memory) / 2**20, 1) if memory else None,
        "governor": (_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or "").strip() or None,
        **({"power_mode": mode} if (mode := power_mode()) else {}),
        # A release such as 6.1.0-name tells who built the kernel; the first two numbers tell what matters.
        "system": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def command(arguments: Sequence[str] | None = None) -> str:
    """The command line that ran, to be typed again: folders above the working directory are left out of paths."""
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
