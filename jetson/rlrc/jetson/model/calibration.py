"""Published measurements, the fit of the roofline's efficiencies to them, and the error of every prediction.

Four numbers are fitted: ``compute`` of the two stacks, ``side``, ``bandwidth``. A grid is searched for the smallest sum
of absolute log ratios, which tolerates measurements that contradict each other. Listed measurements count twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import geometries
from rlrc.jetson.model.devices import device, read_table
from rlrc.jetson.model.precision import precision
from rlrc.jetson.model.roofline import LAUNCH, Demand, Efficiency, Stack, compute, demand
from rlrc.jetson.model.work import Load, work

FILE = Path(__file__).with_name("measurements.toml")
COMPUTES = np.geomspace(0.1, 1.0, 31)
SIDES = (1000.0, 1500.0, 2000.0, 2500.0, 3000.0, 4000.0, 5000.0)
BANDWIDTHS = (0.7, 0.75, 0.8, 0.85, 0.9)
LISTED_WEIGHT = 2.0


@dataclass(frozen=True)
class Measurement:
    """One row of measurements.toml. None: as in the geometry."""

    geometry: str
    device: str
    precision: str
    ms: float
    program: str
    stack: Stack
    source: str
    cameras: int | None = None
    prompt_tokens: int | None = None
    horizon: int | None = None
    listed: bool = False
    note: str = ""


@dataclass(frozen=True)
class _MeasurementFile:
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class Fit:
    compiled: float
    plain: float
    side: float
    bandwidth: float


@dataclass(frozen=True)
class PredictionRow:
    """Predictions by a fit to all other measurements, in ms: with the measurement's stack, and without one."""

    measurement: Measurement
    own_ms: float
    untold_ms: float

    @property
    def own_error(self) -> float:
        return self.own_ms / self.measurement.ms - 1

    @property
    def untold_error(self) -> float:
        return self.untold_ms / self.measurement.ms - 1


def measurements() -> tuple[Measurement, ...]:
    found = read_table(_MeasurementFile, FILE)
    return found.measurements


def demand_of(measured: Measurement) -> Demand:
    """The demand of the measured decision on its device."""
    geometry, module = geometries.geometry(measured.geometry), device(measured.device)
    load = Load(measured.cameras, measured.prompt_tokens, horizon=measured.horizon)
    parts = [
        demand(part, precision(measured.precision), module)
        for part in work(geometry.policy, geometry.towers, load).parts
    ]
    names = ("arithmetic", "sides", "traffic", "kernels")
    return Demand(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class _Grid:
    """Log ratios of predictions to measurements at each point of the grid: (side x bandwidth, compute, N)."""

    def __init__(self, measured: tuple[Measurement, ...]) -> None:
        self.measured, self.points = measured, list(product(SIDES, BANDWIDTHS))
        asked = [demand_of(one) for one in measured]
        seconds = [
            [[load.seconds(Efficiency(reached, side, bandwidth, LAUNCH)) for load in asked] for reached in COMPUTES]
            for side, bandwidth in self.points
        ]
        self.ratios: NDArray[np.float64] = np.log(np.array(seconds) * 1e3 / [one.ms for one in measured])
        self.weights = np.array([LISTED_WEIGHT if one.listed else 1.0 for one in measured])
        self.compiled = np.array([one.stack == "compiled" for one in measured])

    def best(self, without: int | None = None) -> tuple[int, int, int]:
        """Indices of the best point, and of compiled and plain in COMPUTES; the measurement ``without`` is left out."""
        weights = self.weights.copy()
        if without is not None:
            weights[without] = 0
        cost = np.abs(self.ratios) * weights
        compiled, plain = (cost[:, :, chosen].sum(2) for chosen in (self.compiled, ~self.compiled))
        point = int((compiled.min(1) + plain.min(1)).argmin())
        return point, int(compiled[point].argmin()), int(plain[point].argmin())

    def fit(self, without: int | None = None) -> Fit:
        point, compiled, plain = self.best(without)
        return Fit(float(COMPUTES[compiled]), float(COMPUTES[plain]), *self.points[point])


@cache
def grid() -> _Grid:
    return _Grid(measurements())


def fit() -> Fit:
    return grid().fit()


def leave_one_out() -> list[PredictionRow]:
    rows = []
    for index, measured in enumerate(grid().measured):
        fitted = grid().fit(index)
        of: dict[Stack, float] = {"compiled": fitted.compiled, "plain": fitted.plain}
        asked = demand_of(measured)

        def milliseconds(reached: float, asked: Demand = asked, fitted: Fit = fitted) -> float:
            return 1e3 * asked.seconds(Efficiency(reached, fitted.side, fitted.bandwidth, LAUNCH))

        untold = compute(precision(measured.precision), None, of)
        rows.append(PredictionRow(measured, milliseconds(of[measured.stack]), milliseconds(untold)))
    return rows


def summary(errors: list[float]) -> dict[str, float]:
    """The median of the absolute relative errors, and the largest ratio in either direction."""
    return {
        "median_error": float(np.median(np.abs(errors))),
        "worst_ratio": max(max(1 + error, 1 / (1 + error)) for error in errors),
    }
