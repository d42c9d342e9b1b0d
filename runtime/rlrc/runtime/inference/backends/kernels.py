"""The class of this processor: the instruction sets by which engines choose their matrix kernels.

Read from the processor itself through the C library, as engines do. /proc/cpuinfo describes the host under an emulator.
ONNX Runtime and llama.cpp choose 8-bit kernels by these sets, and kernels differ in their results (docs/export.md).
"""

from __future__ import annotations

import ctypes
import platform
import re
from functools import cache
from pathlib import Path

UNKNOWN = "unknown"
# Names as in /proc/cpuinfo. x86-64: (leaf in the order of glibc's cpu_features, register, bit).
X86 = {
    "avx": (0, 2, 28),
    "avx2": (1, 1, 5),
    "avx512f": (1, 1, 16),
    "avx512dq": (1, 1, 17),
    "avx512bw": (1, 1, 30),
    "avx512vl": (1, 1, 31),
    "avx512_vnni": (1, 2, 11),
    "amx_int8": (1, 3, 25),
    "avx_vnni": (6, 0, 4),
    "avx512_bf16": (6, 0, 5),
}
ARM = {"asimddp": (16, 20), "sve": (16, 22), "i8mm": (26, 13), "bf16": (26, 14)}  # (AT_HWCAP or AT_HWCAP2, bit)


@cache
def kernels() -> str:
    """Such as "x86-64 avx2", "x86-64 avx512-vnni-bf16-amx", "aarch64 dotprod-i8mm"; "... unknown" elsewhere."""
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        found = _x86()
        return f"x86-64 {UNKNOWN if found is None else x86_class(found)}"
    if machine == "aarch64" and platform.system() == "Linux":
        return f"aarch64 {arm_class(_arm())}"
    return f"{machine} {UNKNOWN}"


def x86_class(found: set[str]) -> str:
    """The class for instruction sets, given by their names in /proc/cpuinfo."""
    if found >= {"avx512f", "avx512dq", "avx512bw", "avx512vl"}:
        width = "avx512"
    else:
        width = next((name for name in ("avx2", "avx") if name in found), "sse")
    vnni = not found.isdisjoint({"avx512_vnni", "avx_vnni"})
    parts = (width, "vnni" * vnni, "bf16" * ("avx512_bf16" in found), "amx" * ("amx_int8" in found))
    return "-".join(filter(None, parts))


def arm_class(found: set[str]) -> str:
    """The class for instruction sets, given by their names in /proc/cpuinfo."""
    names = ("dotprod" if name == "asimddp" else name for name in ARM if name in found)
    return "-".join(names) or "neon"


def _x86() -> set[str] | None:
    """The instruction sets that programs may use; None if unknown."""
    try:
        leaf = ctypes.CDLL("libc.so.6").__x86_get_cpuid_feature_leaf  # glibc 2.33 and later
    except (AttributeError, OSError):
        return _cpuinfo()
    leaf.restype, leaf.argtypes = ctypes.POINTER(ctypes.c_uint32 * 8), [ctypes.c_uint32]
    # Four registers as the processor reports them, then the same four with only usable features.
    return {name for name, (index, register, bit) in X86.items() if leaf(index).contents[4 + register] >> bit & 1}


def _cpuinfo() -> set[str] | None:
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if flags is None else set(flags[1].split())


def _arm() -> set[str]:
    ask = ctypes.CDLL(None).getauxval
    ask.restype, ask.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return {name for name, (kind, bit) in ARM.items() if ask(kind) >> bit & 1}
