"""Precisions: how many bits weights take, what products compute in, and which devices and policies take which.

Names are those of ``rlrc export`` and ``rlrc quantize`` where they have them.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlrc.errors import UserError
from rlrc.jetson.model.devices import Device


@dataclass(frozen=True)
class Precision:
    """``bits`` of a weight of a linear layer, its share of the scales included; ``other`` of all other numbers.

    ``compute``: the types that products can run in, the first that the device has. ``activation``: bytes. ``widened``:
    bits of a weight in memory on a CPU. ``grouped``: groups of weights share a scale; what fills none stays as it is.
    """

    name: str
    bits: float
    compute: tuple[str, ...]
    other: float = 16
    activation: int = 2
    widened: float | None = None
    grouped: bool = False

    def resident(self, device: Device) -> float:
        """Bits of a linear layer's weight in memory while it runs: ONNX Runtime's CPU kernels widen some at load."""
        return self.bits if device.sm is not None or self.widened is None else self.widened


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", 32, ("tf32", "fp32"), 32, 4),
        Precision("fp16", 16, ("fp16", "fp32"), widened=32),
        Precision("bf16", 16, ("bf16", "fp32"), widened=32),
        # Groups of 32 with a scale of 16 bits, widened before the products.
        Precision("w8", 8.5, ("fp16", "fp32"), widened=32, grouped=True),
        Precision("int8", 8, ("int8", "fp16", "fp32")),
        Precision("fp8", 8, ("fp8", "fp16", "fp32")),
        Precision("int4", 4.5, ("fp16", "fp32"), grouped=True),
        Precision("w4a8", 4.5, ("int8", "fp16", "fp32"), widened=8, grouped=True),
        # NVFP4: groups of 16 with a scale of 8 bits.
        Precision("fp4", 4.5, ("fp4", "fp16", "fp32"), grouped=True),
    )
}
ALIASES = {"nvfp4": "fp4", "float16": "fp16", "float32": "fp32", "bfloat16": "bf16", "half": "fp16"}
NEEDS_SM = {"fp8": "8.9", "fp4": "10.0"}
ADVICE = {"fp8": "int8 or int4", "fp4": "int4"}
OVERFLOWS = {"pi05": "its activations leave fp16's range, and actions become NaN"}


def precision(name: str) -> Precision:
    """Raises UserError for an unknown name."""
    plain = ALIASES.get(name.lower(), name.lower())
    if plain not in PRECISIONS:
        raise UserError(f"expected a precision of {', '.join(PRECISIONS)}, found {name!r}; give one of those")
    return PRECISIONS[plain]


def computes(precision: Precision, device: Device) -> str:
    """The type that products run in on this device."""
    return next(kind for kind in precision.compute if kind in device.peaks)


def refusals(precision: Precision, device: Device, family: str) -> list[str]:
    """Why this precision must not be used on this device for this family; none if it may."""
    found = []
    needed = NEEDS_SM.get(precision.name)
    if needed is not None and precision.name not in device.peaks:
        has = f"SM {device.sm}" if device.sm else "no GPU"
        found.append(
            f"{precision.name} needs tensor cores of SM {needed} or later, {device.name} has {has}: engines would "
            f"fall back to other types layer by layer; use {ADVICE[precision.name]} (figures: weights stored so, "
            f"products in {computes(precision, device)})"
        )
    if precision.name == "fp16" and family in OVERFLOWS:
        found.append(f"fp16 overflows in {family}: {OVERFLOWS[family]}; use bf16, or int8 or int4 weights with bf16")
    return found
