"""Predict whether a stage fits into memory, before it starts, instead of being killed in the middle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlrc.errors import UserError

WEIGHTS = 4  # bytes for each parameter that is trained or simulated: float32
ADAMW = 12  # a gradient and two moments for each trained parameter
RESERVE = 500_000_000  # torch, and the batch
WIDENED = 3  # float32 copies of the largest matrix: itself, its magnitudes or gradient, and the product's own copy

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that this process may still allocate, by the machine and its control group; None if unknown."""
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


def count_numbers(tensors: Mapping[str, Tensor]) -> int:
    """Number of elements of a state dict, which may be on the meta device."""
    return sum(tensor.numel() for tensor in tensors.values())


def streamed(tensors: Mapping[str, Tensor]) -> int:
    """Bytes at the peak of a stage that widens one matrix at a time and leaves the others in their mapped files."""
    return WIDENED * WEIGHTS * max((tensor.numel() for name, tensor in tensors.items() if _is_widened(name)), default=0)


def _is_widened(name: str) -> bool:
    """Of an embedding only the rows of a prompt are widened."""
    return not name.startswith("embedding")


def check(needed: int, work: str) -> None:
    """Raises UserError if ``work`` is predicted to need more bytes than are free."""
    needed += RESERVE
    free = available()
    if free is not None and needed > free:
        raise UserError(
            f"expected {needed / 1e9:.1f} GB of free memory for {work}, found {free / 1e9:.1f} GB; close other "
            "programs or use a larger machine"
        )


def check_training(tensors: Mapping[str, Tensor], adapters: bool, copies: int = 1, teacher: int = 0) -> None:
    """Check weights, gradients and AdamW's moments (negligible for adapters); see ``check``.

    ``copies`` of the weights in all; ``teacher``: number of a teacher's parameters.
    """
    advice = "" if adapters else " of all weights (adapters need less: --lora 16)"
    trained = count_numbers(tensors) * (WEIGHTS * copies + (0 if adapters else ADAMW))
    check(trained + teacher * WEIGHTS, f"training{advice}")
