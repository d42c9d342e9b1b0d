"""The precisions of a policy's graphs: the one table of the project. Standard library only.

A precision says how the weights of linear layers are stored and what their products compute in. The exporters write
graphs in it, the runtime verifies them to its limits, the planner and the benchmarks count its bits. How a precision
becomes operators of an engine is in that engine's exporter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rlrc.errors import UserError

ExportPrecision = Literal[
    "fp16", "bf16", "fp32", "int8", "int8-rows", "int8+int4", "int4", "int4a8", "w4a8", "w8", "q4_k_m"
]
"""What ``rlrc export --precision`` takes."""
TensorRTPrecision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
"""What a build plan for TensorRT is in."""


@dataclass(frozen=True)
class Precision:
    name: str
    bits: float
    """of a weight of a linear layer in the file, its share of the scales included"""
    compute: tuple[str, ...]
    """types that products can run in, preferred first; a device uses the first that it has"""
    cpu: str | None = None
    """the type that products run in on ONNX Runtime's CPU kernels; None: they have no such graphs"""
    other: float = 16
    """bits of all other numbers in the file"""
    activation: int = 2
    """bytes of an activation"""
    widened: float | None = None
    """bits of a weight in memory where ONNX Runtime's CPU kernels widen it at load"""
    group: int = 0
    """inputs that share a scale; tensors that do not consist of whole groups are stored as other numbers"""
    exact: tuple[str, ...] = ()
    """backends on which graphs differ from torch by the order of floating-point sums only"""
    spacing: float = 0.0
    """relative distance of neighbouring numbers in what products are rounded to; closer logits are a tie. On the
    reference policy fp16 changed tokens up to 0.0014 apart and bf16 up to 0.043, at logits of 20"""
    range_tolerance: float = 0.01
    """largest error, as part of each action dimension's range, on 99 % of the observations, where not exact"""
    least_sm: int | None = None
    """lowest compute capability of an NVIDIA GPU with these products, 87 for 8.7"""
    instead: str | None = None
    """what to use on GPUs that would fall back to other types layer by layer"""

    def regrouped(self, group: int) -> Precision:
        """The same with groups of another size and scales of 16 bits; itself without groups."""
        if not self.group:
            return self
        return replace(self, group=group, bits=self.bits - 16 / self.group + 16 / group)

    @property
    def in_memory(self) -> float:
        """Bits of a linear layer's weight while ONNX Runtime's CPU kernels run."""
        return self.bits if self.widened is None else self.widened


FP16, BF16 = 2.0**-10, 2.0**-7  # spacing
PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", 32, ("tf32", "fp32"), "fp32", 32, 4, exact=("onnxruntime", "tensorrt", "gguf"), least_sm=50),
        Precision("fp16", 16, ("fp16", "fp32"), "fp32", widened=32, exact=("onnxruntime",), spacing=FP16, least_sm=53),
        Precision("bf16", 16, ("bf16", "fp32"), widened=32, spacing=BF16, least_sm=80),
        # 8-bit weights in groups of 32 with a scale of 16 bits, widened before the products.
        Precision("w8", 8.5, ("fp16", "fp32"), "fp32", widened=32, group=32, exact=("onnxruntime",)),
        Precision("int8", 8, ("int8", "fp16", "fp32"), "int8", least_sm=72),
        # int8 with one scale of the activations for each row.
        Precision("int8-rows", 8, ("int8", "fp16", "fp32"), "int8"),
        Precision("fp8", 8, ("fp8", "fp16", "fp32"), least_sm=89, instead="int8 or int4"),
        Precision(
            "int4",
            4.5,
            ("fp16", "fp32"),
            "fp32",
            group=32,
            exact=("onnxruntime",),
            spacing=FP16,
            range_tolerance=0.02,
            least_sm=80,
        ),
        # int4 whose products round activations to 8 bits.
        Precision("int4a8", 4.5, ("int8", "fp16", "fp32"), "int8", group=32, range_tolerance=0.02),
        # int4 in the file, int8 in memory and in products.
        Precision("w4a8", 4.5, ("int8", "fp16", "fp32"), "int8", widened=8, group=32, range_tolerance=0.02),
        # The prompt in int8-rows, tokens one by one in int4a8; both copies of the weights are kept.
        Precision("int8+int4", 12.5, ("int8", "fp16", "fp32"), "int8", group=32, range_tolerance=0.02),
        # llama.cpp's mix of 4- and 6-bit blocks.
        Precision("q4_k_m", 4.85, ("int8", "fp16", "fp32"), group=32, range_tolerance=0.02),
        # NVFP4: groups of 16 with a scale of 8 bits.
        Precision("fp4", 4.5, ("fp4", "fp16", "fp32"), group=16, range_tolerance=0.02, least_sm=100, instead="int4"),
    )
}
ALIASES = {"nvfp4": "fp4", "float16": "fp16", "float32": "fp32", "bfloat16": "bf16", "half": "fp16"}

CHOICES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "onnxruntime": {
        "float": ("fp16", "fp32", "int8", "int8-rows"),
        "int4": ("int4", "int4a8", "int8", "int8-rows", "w4a8", "int8+int4"),
        "int8": ("w8", "int8", "int8-rows"),
    },
    "tensorrt": {
        "float": ("fp16", "bf16", "fp32", "int8", "fp8"),
        "int4": ("int4", "fp16", "bf16", "int8", "fp8"),
        "int8": ("fp16", "bf16", "int8", "fp8"),
    },
    "gguf": {
        "float": ("fp16", "fp32", "int8", "q4_k_m"),
        "int4": ("int4", "int4a8", "int8+int4"),
        "int8": ("int8",),
    },
}
"""By backend and grid of the weights ("float": not quantized): the precisions of its graphs, the default first."""

OVERFLOWS = {"pi05": "its activations leave fp16's range, and actions become NaN"}
"""Families that fp16 cannot compute, and why."""


def find_precision(name: str, known: Mapping[str, Precision] = PRECISIONS) -> Precision:
    """Of a name or an alias. Raises UserError for an unknown one."""
    plain = ALIASES.get(name.lower(), name.lower())
    if plain not in known:
        raise UserError(f"expected a precision of {', '.join(known)}, found {name!r}; give one of those")
    return known[plain]
