"""This machine as a device: throughput and bandwidth measured with numpy, memory of a process with the runtime."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from rlrc.errors import UserError
from rlrc.jetson.model.devices import CPU, Device

SIDE = 1024  # of the matrices
COPIED = 64 * 2**20  # bytes, beyond any cache
TRIALS = 5

IMPORTED = """
import re
import numpy
from rlrc.runtime.inference.backends import onnxruntime
from rlrc.runtime.inference.policy import LocalPolicy
print(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def this_machine() -> Device:
    """``peaks``: the best fp32 matrix product; bandwidth: the best copy, read and written bytes counted."""
    if not Path("/proc/meminfo").exists():
        raise UserError(f"expected /proc/meminfo for the device {CPU}, found none; run it on Linux")
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert memory is not None
    return Device(
        CPU,
        f"this machine ({platform.machine()}, {os.cpu_count()} cores)",
        "measured",
        None,
        {"fp32": products(), "int8": products()},
        copies(),
        int(memory[1]) * 1024,
        None,
    )


def products() -> float:
    """Floating-point operations a second."""
    a = np.ones((SIDE, SIDE), np.float32)
    return 2 * SIDE**3 / _best(lambda: a @ a)


def copies() -> float:
    """Bytes a second."""
    source = np.ones(COPIED, np.uint8)
    target = np.zeros_like(source)
    return 2 * COPIED / _best(lambda: np.copyto(target, source))


def imported_bytes() -> int:
    """Resident memory of a fresh process that has imported the runtime and its engine."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"expected a process that imports the runtime, found {reason}; run pip install 'rlrc[cpu]'")
    return int(done.stdout) * 1024


def _best(run: object) -> float:
    assert callable(run)
    run()
    seconds = []
    for _ in range(TRIALS):
        started = perf_counter()
        run()
        seconds.append(perf_counter() - started)
    return min(seconds)
