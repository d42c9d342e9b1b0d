"""Energy in joules from the power rails of a Jetson (INA3221) or the counters of x86 processors (RAPL).

Counters are read before and after. Rails give momentary power, which a thread samples and integrates. Both cover the
whole board or package, so the idle power is measured first and reported as well.
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

PERIOD_S = 0.02  # between samples of the rails, about the averaging time of an INA3221
RAPL = "sys/class/powercap"


@dataclass(frozen=True)
class Rail:
    """One channel of an INA3221: files with millivolts and milliamperes."""

    name: str
    voltage: Path
    current: Path

    def watts(self) -> float:
        return int(self.voltage.read_text()) * int(self.current.read_text()) / 1e6


@dataclass(frozen=True)
class Counter:
    """A RAPL domain: microjoules, wrapping to zero after ``largest``."""

    name: str
    path: Path
    largest: int

    def microjoules(self) -> int:
        return int(self.path.read_text())


@dataclass
class EnergyUsed:
    """Joules of every rail or counter, by name, and seconds, while ``meter`` was open."""

    joules: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> float:
        """The Jetson module's total; on an unknown board the sum of all rails, on processors of all packages."""
        whole = module_total(self.joules)
        return sum(self.joules.values()) if whole is None else whole


Sources = tuple[list[Rail], list[Counter]]


def rails(root: Path = Path("/")) -> list[Rail]:
    """Every labelled channel of every INA3221 (Linux, Documentation/hwmon/ina3221.rst)."""
    channels = []
    for chip in hwmon(root, "ina3221"):
        # Channels beyond the third are shunt voltages and sums, which have no current of their own.
        for channel in (1, 2, 3):
            name = read_text(chip / f"in{channel}_label")
            voltage, current = chip / f"in{channel}_input", chip / f"curr{channel}_input"
            if name and name != "NC" and voltage.exists() and current.exists():
                channels.append(Rail(name, voltage, current))
    return channels


def counters(root: Path = Path("/")) -> tuple[list[Counter], str]:
    """The readable counters of the packages, and the reason if there are none (Linux, power/powercap/powercap.rst)."""
    packages, reason = [], f"no {RAPL}/intel-rapl:*"
    for domain in sorted((root / RAPL).glob("intel-rapl:*")):
        if domain.name.count(":") != 1:
            continue  # a subdomain, which its package includes
        try:
            name = (domain / "name").read_text().strip()
            counter = Counter(name, domain / "energy_uj", int((domain / "max_energy_range_uj").read_text()))
            counter.microjoules()
        except OSError as error:
            reason = f"{RAPL}/{domain.name}/energy_uj: {error.strerror}"
            continue
        # "psys" is the whole platform and includes the packages.
        if not name.startswith("psys"):
            packages.append(counter)
    return packages, reason


def sources(root: Path = Path("/")) -> tuple[Sources | None, str]:
    """The readable sources and a line that names them, or None and the reason."""
    channels = rails(root)
    if channels:
        return (channels, []), f"INA3221: {', '.join(rail.name for rail in channels)}"
    packages, reason = counters(root)
    if packages:
        return ([], packages), f"RAPL: {', '.join(counter.name for counter in packages)}"
    return None, f"not available: no INA3221 power rails, and {reason}"


@contextmanager
def meter(sources: Sources) -> Iterator[EnergyUsed]:
    """Yield a record that is filled in when the block ends. Raises OSError if a rail disappears meanwhile."""
    channels, packages = sources
    used, integral = EnergyUsed(), _Integral(channels)
    before = [counter.microjoules() for counter in packages]
    integral.sample()
    try:
        with _sampling(integral) if channels else nullcontext():
            yield used
    finally:
        used.seconds = integral.sample()
        used.joules |= integral.joules
        for counter, start in zip(packages, before, strict=True):
            change = counter.microjoules() - start
            # It wraps at most once: at 100 W, 32 bits of 61 microjoules last 40 minutes.
            used.joules[counter.name] = (change if change >= 0 else change + counter.largest) / 1e6


class _Integral:
    """Energy of all rails by the trapezoidal rule."""

    def __init__(self, channels: list[Rail]) -> None:
        self._channels, self._times = channels, list[float]()
        self._watts: list[float] = []
        self.joules = {rail.name: 0.0 for rail in channels}

    def sample(self) -> float:
        """Take a sample; -> seconds since the first one."""
        now, watts = time.perf_counter(), [rail.watts() for rail in self._channels]
        if self._times:
            for rail, old, new in zip(self._channels, self._watts, watts, strict=True):
                self.joules[rail.name] += (old + new) / 2 * (now - self._times[-1])
        self._times, self._watts = [*self._times[:1], now], watts
        return now - self._times[0]


@contextmanager
def _sampling(integral: _Integral) -> Iterator[None]:
    """Sample in a thread while the block runs."""
    stop, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not stop.wait(PERIOD_S):
                integral.sample()
        except (OSError, ValueError) as error:
            errors.append(error)

    sampler = threading.Thread(target=run, name="power rails", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join()
    if errors:
        raise errors[0]


def measure(
    sources: Sources, calls: dict[str, Callable[[], object]], seconds: float, rounds: int, tick: Callable[[int], None]
) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """-> idle watts, and for every name the (joules a call, watts) of each round.

    In every round, each call in turn is repeated for ``seconds``.
    """
    with meter(sources) as idle:
        time.sleep(seconds)
    tick(1)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            number, end = 0, time.perf_counter() + seconds
            with meter(sources) as used:
                while not number or time.perf_counter() < end:
                    call()
                    number += 1
            measured[name].append((used.total / number, used.total / used.seconds))
            tick(1)
    return idle.total / idle.seconds, measured


def row(measured: list[tuple[float, float]], idle: float, horizon: int) -> dict[str, object]:
    """Joules a chunk and an action, with 95 % intervals over the rounds; ``above_idle``: less the idle power."""
    chunk = mean_interval([joules for joules, _ in measured])
    watts = sum(power for _, power in measured) / len(measured)
    above = mean_interval([joules * (1 - idle / power) for joules, power in measured])
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
