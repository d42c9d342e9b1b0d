"""The precisions that a plan can be made for, and which devices and policies take which."""

from __future__ import annotations

from rlrc.artifact.precisions import OVERFLOWS, Precision, find_precision
from rlrc.artifact.precisions import PRECISIONS as ALL
from rlrc.jetson.model.devices import Device

PLANNED = ("fp32", "fp16", "bf16", "w8", "int8", "fp8", "int4", "w4a8", "fp4")
PRECISIONS = {name: ALL[name] for name in PLANNED}


def precision(name: str) -> Precision:
    """Raises UserError for an unknown name."""
    return find_precision(name, PRECISIONS)


def resident_bits(precision: Precision, device: Device) -> float:
    """Bits of a linear layer's weight in memory while it runs: ONNX Runtime's CPU kernels widen some at load."""
    return precision.in_memory if device.sm is None else precision.bits


def computes(precision: Precision, device: Device) -> str:
    """The type that products run in on this device."""
    return next(kind for kind in precision.compute if kind in device.peaks)


def refusals(precision: Precision, device: Device, family: str) -> list[str]:
    """Why this precision must not be used on this device for this family; none if it may."""
    found = []
    if precision.instead and precision.least_sm and precision.name not in device.peaks:
        has = f"SM {device.sm}" if device.sm else "no GPU"
        found.append(
            f"{precision.name} needs tensor cores of SM {precision.least_sm / 10:.1f} or later, {device.name} has "
            f"{has}: engines would fall back to other types layer by layer; use {precision.instead} (figures: weights "
            f"stored so, products in {computes(precision, device)})"
        )
    if precision.name == "fp16" and family in OVERFLOWS:
        found.append(f"fp16 overflows in {family}: {OVERFLOWS[family]}; use bf16, or int8 or int4 weights with bf16")
    return found
