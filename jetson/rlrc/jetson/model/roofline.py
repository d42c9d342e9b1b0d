"""Time from operations: a roofline whose efficiencies are calibrated on published measurements (calibration.py).

An operation takes as long as its arithmetic or its memory traffic, whichever is longer (Williams et al., CACM 2009),
and LAUNCH seconds for every kernel. A product reaches ``compute * side / (side + SIDE)`` of the device's peak, where
``side`` is the cube root of its multiply-adds: small products leave most of a GPU's tensor cores idle.

Programs differ by a factor of two to three on the same GPU, so there are two stacks. "compiled": TensorRT, MLC, kernels
written for the model, a graph launched as a whole. "plain": llama.cpp, eager PyTorch. Only the former is fast with
weights of less than 16 bits. For 16 bits and more, and no stack given, the geometric mean of both is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact.precisions import Precision
from rlrc.jetson.model.devices import Device
from rlrc.jetson.model.precision import computes, resident_bits
from rlrc.jetson.model.work import DecisionWork, Part

Stack = Literal["compiled", "plain"]


@dataclass(frozen=True)
class Efficiency:
    """``compute``: part of the peak that large products reach; ``bandwidth``: part of the memory's."""

    compute: float
    side: float
    bandwidth: float
    launch: float


LAUNCH = 2e-6  # seconds; not fitted: the measurements cannot separate it from small products
SIDE = 3000.0
BANDWIDTH = 0.9
COMPUTE: dict[Stack, float] = {"compiled": 1.0, "plain": 0.4}
MEASURED = Efficiency(1.0, 0.0, 1.0, 0.0)  # of a device whose throughput was measured


@dataclass(frozen=True)
class Demand:
    """For each operation: seconds at the peak, side, seconds of traffic at full bandwidth, kernels."""

    arithmetic: NDArray[np.float64]
    sides: NDArray[np.float64]
    traffic: NDArray[np.float64]
    kernels: NDArray[np.float64]

    def seconds(self, efficiency: Efficiency) -> float:
        reached = np.where(self.sides > 0, self.sides / (self.sides + efficiency.side + 1e-12), 1.0)
        longest = np.maximum(self.arithmetic / (efficiency.compute * reached), self.traffic / efficiency.bandwidth)
        return float(longest.sum() + efficiency.launch * self.kernels.sum())


def demand(part: Part, precision: Precision, device: Device) -> Demand:
    """The demand of all repeats of one part. Each repeat reads the weights again: no cache holds them."""
    peak = device.peaks[computes(precision, device)]
    bits, other = resident_bits(precision, device), precision.other

    def column(name: str) -> NDArray[np.float64]:
        return np.array([getattr(op, name) for op in part.ops], np.float64)

    odd = np.array([op.ungrouped(precision.group) for op in part.ops], np.float64)
    moved = ((column("weights") - odd) * bits + odd * other) / 8 + column("activations") * precision.activation
    times = part.times
    return Demand(
        times * column("flops") / peak, column("side"), times * moved / device.bandwidth, times * column("kernels")
    )


def efficiency(device: Device, precision: Precision, stack: Stack | None) -> Efficiency:
    if device.sm is None:
        return MEASURED
    return Efficiency(compute(precision, stack, COMPUTE), SIDE, BANDWIDTH, LAUNCH)


def compute(precision: Precision, stack: Stack | None, of: dict[Stack, float]) -> float:
    """The stack's value, or the default without a stack: see the module's docstring."""
    if stack is None and precision.bits < 16:
        stack = "compiled"
    return float(np.sqrt(of["compiled"] * of["plain"])) if stack is None else of[stack]


def latencies(work: DecisionWork, precision: Precision, device: Device, stack: Stack | None = None) -> dict[str, float]:
    """Milliseconds of every part."""
    reached = efficiency(device, precision, stack)
    return {part.name: 1e3 * demand(part, precision, device).seconds(reached) for part in work.parts}
