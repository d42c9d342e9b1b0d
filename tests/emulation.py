"""This Python on a processor that has no instructions for 8-bit products (x86-64 with AVX2 only), emulated by QEMU.

The engine chooses its kernels there as on such a processor, so tests find on every machine what is wrong with them. One
process at a time and no subprocesses; it starts ONNX Runtime within two seconds.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = "x86-64 avx2"
CPU = "Haswell,-hle,-rtm,-invpcid,-pcid,-x2apic,-tsc-deadline"  # less what QEMU warns that it has not
ROOT = Path(__file__).parents[1]
QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
emulates = pytest.mark.skipif(
    QEMU is None or platform.machine() != "x86_64",
    reason="needs an x86-64 machine with QEMU's user mode: apt-get install qemu-user-static",
)


def emulated(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` there."""
    assert QEMU is not None
    own = {"PYTHONPATH": f"{ROOT / 'exporters'}:{ROOT / 'runtime'}", **environment}
    return subprocess.run(
        [QEMU, "-cpu", CPU, sys.executable, *arguments],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
