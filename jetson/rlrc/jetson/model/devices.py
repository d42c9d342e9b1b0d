"""The table of devices (devices.toml): throughput, bandwidth, memory, power modes and JetPack of each module."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from rlrc.errors import UserError
from rlrc.strict import read_toml

FILE = Path(__file__).with_name("devices.toml")
CPU = "cpu"  # this machine, measured (see probe.py)
T = TypeVar("T")


@dataclass(frozen=True)
class PowerMode:
    """A mode of nvpmodel. ``watts``: its power limit."""

    name: str
    multiprocessors: int
    mhz: float
    bandwidth_gbs: float
    watts: float


@dataclass(frozen=True)
class Architecture:
    """``rates``: operations of a multiprocessor a clock, by the type that it computes in; a multiply-add is two."""

    sm: str
    rates: dict[str, int]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class JetPack:
    """``image``: the container to build on; ``wheels``: the package index with onnxruntime-gpu for it."""

    linux: str
    ubuntu: str
    python: str
    cuda: str
    tensorrt: str
    image: str
    wheels: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """``visible_gib``: memory that Linux has; firmware keeps the rest."""

    title: str
    aliases: tuple[str, ...]
    architecture: str
    memory_gib: float
    visible_gib: float
    jetpacks: tuple[str, ...]
    modes: tuple[PowerMode, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class DeviceTable:
    architectures: dict[str, Architecture]
    jetpacks: dict[str, JetPack]
    devices: dict[str, Module]


@dataclass(frozen=True)
class Device:
    """A module in a mode, or this machine. ``peaks``: operations a second by type; ``bandwidth`` in bytes a second.

    ``sm`` None: no CUDA device.
    """

    name: str
    title: str
    mode: str
    sm: str | None
    peaks: dict[str, float]
    bandwidth: float
    visible_bytes: int
    watts: float | None


@cache
def table() -> DeviceTable:
    return read_table(DeviceTable, FILE)


def read_table(kind: type[T], file: Path) -> T:
    """A table that comes with rlrc. Raises UserError for a file that is missing or does not fit ``kind``."""
    return read_toml(kind, file, f"{kind.__name__} in {file}", "install rlrc again")


def find(name: str) -> str:
    """The device's name in the table, for a name, an alias, or either with the prefix "jetson-". Raises UserError."""
    plain = name.lower().replace("_", "-").replace(" ", "-")
    for candidate in (plain, plain.removeprefix("jetson-")):
        for known, module in table().devices.items():
            if candidate == known or candidate in module.aliases:
                return known
    known_names = [*table().devices, CPU]
    aliases = [alias for module in table().devices.values() for alias in module.aliases]
    close = difflib.get_close_matches(plain, [*known_names, *aliases], 1, 0)
    raise UserError(f"expected a device of {', '.join(known_names)}, found {name!r}; the nearest is {close[0]}")


def device(name: str, mode: str | None = None) -> Device:
    """A module in a mode, by default the fastest. Raises UserError for an unknown device or mode."""
    key = find(name)
    module = table().devices[key]
    modes = {found.name.lower(): found for found in module.modes}
    if mode is not None and mode.lower() not in modes:
        raise UserError(
            f"expected a mode of {', '.join(found.name for found in module.modes)} for {key}, found {mode!r}; "
            "give one of those"
        )
    chosen = module.modes[0] if mode is None else modes[mode.lower()]
    architecture = table().architectures[module.architecture]
    return Device(
        key,
        module.title,
        chosen.name,
        architecture.sm,
        {kind: rate * chosen.multiprocessors * chosen.mhz * 1e6 for kind, rate in architecture.rates.items()},
        chosen.bandwidth_gbs * 1e9,
        int(module.visible_gib * 2**30),
        chosen.watts,
    )
