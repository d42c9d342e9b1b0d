"""Whether a stage fits into memory, told before it starts instead of by the kernel in the middle of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlrc.errors import UserError

# Bytes of every parameter at the peak. A random SmolVLA (450 M parameters) took 4.4 GB to prune and 4.3 GB to quantize,
# half a gigabyte of it torch itself: its float32 weights, and what is made of them.
WEIGHTS, REWRITTEN = 4, 8
ADAMW = 12  # a gradient and two moments of everything that is trained
RESERVE = 500_000_000  # torch, and the batch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that this process may still take, by the machine and its control group; None where nothing tells."""
    found = []
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            found.append(int(limit) - int(used) + int(cached.get("inactive_file", 0)))
    except OSError:
        pass
    return min(found) if found else None


def numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many there are in a state dict, which may be without data."""
    return sum(tensor.numel() for tensor in tensors.values())


def check(needed: int, work: str) -> None:
    """Raises UserError if ``work`` is predicted to need more bytes than are free."""
    needed += RESERVE
    free = available()
    if free is not None and needed > free:
        raise UserError(
            f"expected {needed / 1e9:.1f} GB of free memory for {work}, found {free / 1e9:.1f} GB; close other "
            "programs or use a larger machine"
        )


def check_training(tensors: Mapping[str, Tensor], adapters: bool, copies: int = 1, besides: int = 0) -> None:
    """Weights, gradients and AdamW's moments (adapters: hardly any); ``copies`` of the weights in all.

    ``besides``: numbers of a teacher's weights.
    """
    advice = "" if adapters else " of all weights (adapters need less: --lora 16)"
    trained = numbers(tensors) * (WEIGHTS * copies + (0 if adapters else ADAMW))
    check(trained + besides * WEIGHTS, f"training{advice}")
