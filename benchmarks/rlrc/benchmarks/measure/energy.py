"""Joules, where the machine can tell: the power rails of a Jetson (INA3221), the counters of x86 processors (RAPL).

A counter is read before and after; rails give power now, which is sampled by a thread and integrated. What is measured
is the whole board or package, so the same for doing nothing is measured first and told beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rlrc.benchmarks.results.stats import Estimate, mean_interval
from rlrc.runtime.board.jetson import hwmon, module_total, read_text

PERIOD_S = 0.02  # between samples of the rails; an INA3221 averages over as much
RAPL = "sys/class/powercap"


@dataclass(frozen=True)
class Rail:
    """One channel of an INA3221: millivolts and milliamperes, in files that are read anew every time."""

    name: str
    voltage: Path
    current: Path

    def watts(self) -> float:
        return int(self.voltage.read_text()) * int(self.current.read_text()) / 1e6


@dataclass(frozen=True)
class Counter:
    """A RAPL domain: microjoules that begin again at ``largest``."""

    name: str
    path: Path
    largest: int

    def microjoules(self) -> int:
        return int(self.path.read_text())


@dataclass
class Spent:
    """Of the time in ``meter``: joules of every rail or counter, by name, and seconds."""

    joules: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> float:
        """Of the module, as its rails add up to it; of an unknown board all rails, of processors all packages."""
        whole = module_total(self.joules)
        return sum(self.joules.values()) if whole is None else whole


Sources = tuple[list[Rail], list[Counter]]


def rails(root: Path = Path("/")) -> list[Rail]:
    """Every labelled channel of every INA3221 (Linux, Documentation/hwmon/ina3221.rst)."""
    found = []
    for chip in hwmon(root, "ina3221"):
        # Channels beyond the third are shunt voltages and sums, which have no current of their own.
        for channel in (1, 2, 3):
            name = read_text(chip / f"in{channel}_label")
            voltage, current = chip / f"in{channel}_input", chip / f"curr{channel}_input"
            if name and name != "NC" and voltage.exists() and current.exists():
                found.append(Rail(name, voltage, current))
    return found


def counters(root: Path = Path("/")) -> tuple[list[Counter], str]:
    """The packages' counters that may be read, and why there are none (Linux, power/powercap/powercap.rst)."""
    found, reason = [], f"no {RAPL}/intel-rapl:*"
    for domain in sorted((root / RAPL).glob("intel-rapl:*")):
        if domain.name.count(":") != 1:
            continue  # a part of a package, which has it already
        try:
            name = (domain / "name").read_text().strip()
            counter = Counter(name, domain / "energy_uj", int((domain / "max_energy_range_uj").read_text()))
            counter.microjoules()
        except OSError as error:
            reason = f"{RAPL}/{domain.name}/energy_uj: {error.strerror}"
            continue
        # "psys" is the platform, packages and all: one of them would count twice.
        if not name.startswith("psys"):
            found.append(counter)
    return found, reason


def sources(root: Path = Path("/")) -> tuple[Sources | None, str]:
    """What can be read here, and in a line what that is, or why there is nothing."""
    channels = rails(root)
    if channels:
        return (channels, []), f"INA3221: {', '.join(rail.name for rail in channels)}"
    packages, reason = counters(root)
    if packages:
        return ([], packages), f"RAPL: {', '.join(counter.name for counter in packages)}"
    return None, f"not available: no INA3221 power rails, and {reason}"


@contextmanager
def meter(found: Sources) -> Iterator[Spent]:
    """Fills what it yields when the block ends. Raises OSError for a rail that went away in between."""
    channels, packages = found
    spent, integral = Spent(), _Integral(channels)
    before = [counter.microjoules() for counter in packages]
    integral.sample()
    try:
        with _sampling(integral) if channels else nullcontext():
            yield spent
    finally:
        spent.seconds = integral.sample()
        spent.joules |= integral.joules
        for counter, start in zip(packages, before, strict=True):
            more = counter.microjoules() - start
            # At most once round: a package of 100 W takes 40 minutes to fill 32 bits of 61 microjoules.
            spent.joules[counter.name] = (more if more >= 0 else more + counter.largest) / 1e6


class _Integral:
    """Trapezoids between samples of the power of all rails."""

    def __init__(self, channels: list[Rail]) -> None:
        self._channels, self._times = channels, list[float]()
        self._watts: list[float] = []
        self.joules = {rail.name: 0.0 for rail in channels}

    def sample(self) -> float:
        """-> seconds since the first."""
        now, watts = time.perf_counter(), [rail.watts() for rail in self._channels]
        if self._times:
            for rail, old, new in zip(self._channels, self._watts, watts, strict=True):
                self.joules[rail.name] += (old + new) / 2 * (now - self._times[-1])
        self._times, self._watts = [*self._times[:1], now], watts
        return now - self._times[0]


@contextmanager
def _sampling(integral: _Integral) -> Iterator[None]:
    """Samples taken by a thread while the block runs."""
    stop, lost = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not stop.wait(PERIOD_S):
                integral.sample()
        except (OSError, ValueError) as error:
            lost.append(error)

    sampler = threading.Thread(target=run, name="power rails", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join()
    if lost:
        raise lost[0]


def measure(
    found: Sources, calls: dict[str, Callable[[], object]], seconds: float, rounds: int, tick: Callable[[int], None]
) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """-> watts of doing nothing, and of every call, by name and round, (joules a call, watts).

    The calls take turns: in every round each is repeated for ``seconds``.
    """
    with meter(found) as idle:
        time.sleep(seconds)
    tick(1)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            number, end = 0, time.perf_counter() + seconds
            with meter(found) as spent:
                while not number or time.perf_counter() < end:
                    call()
                    number += 1
            taken[name].append((spent.total / number, spent.total / spent.seconds))
            tick(1)
    return idle.total / idle.seconds, taken


def row(taken: list[tuple[float, float]], idle: float, horizon: int) -> dict[str, object]:
    """Joules a chunk and an action, with 95 % intervals over the rounds; ``above_idle`` without what nothing costs."""
    chunk = mean_interval([joules for joules, _ in taken])
    watts = sum(power for _, power in taken) / len(taken)
    above = mean_interval([joules * (1 - idle / power) for joules, power in taken])
    return {
        "energy": {
            "joules_chunk": _round(chunk),
            "joules_action": _round(Estimate(*(value / horizon for value in (chunk.value, chunk.low, chunk.high)))),
            "joules_chunk_above_idle": _round(above),
            "watts": round(watts, 3),
            "idle_watts": round(idle, 3),
        }
    }


def _round(estimate: Estimate) -> dict[str, float]:
    return {"value": round(estimate.value, 5), "low": round(estimate.low, 5), "high": round(estimate.high, 5)}
