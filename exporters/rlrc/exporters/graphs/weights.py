"""An artifact's tensors for the exporters, read one at a time so that they are never all in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlrc.artifact import Artifact, QuantizationSpec, weight_files
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.storage.tensors import Tensors, tensors_from_safetensors
from rlrc.compressor.models.weights import check_shapes
from rlrc.compressor.quantize.grid import dequantize_groups, unpack
from rlrc.errors import UserError


@dataclass(frozen=True)
class Weights:
    """An artifact's tensors as stored: floats by name, quantized tensors as NAME.q and NAME.scale."""

    tensors: Tensors
    quantization: QuantizationSpec | None = None
    exact: frozenset[str] = frozenset()
    """tensors that graphs keep in float32, because fewer bits would change them"""

    def bits(self, name: str) -> int | None:
        """Bits of a quantized tensor; None for floats."""
        return None if self.quantization is None else self.quantization.tensors.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, quantized or not."""
        if (bits := self.bits(name)) is None:
            return self.tensors.shape(name)
        rows, columns = self.tensors.shape(f"{name}.q")
        return rows, columns * 8 // bits

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by the policy's names."""
        listed, stored = {} if self.quantization is None else self.quantization.tensors, set(self.tensors)
        quantized = [name for name in listed if stored >= {f"{name}.q", f"{name}.scale"}]
        packed = {f"{name}.{part}" for name in quantized for part in ("q", "scale")}
        return {name: self.shape(name) for name in (*quantized, *(stored - packed))}

    def array(self, name: str) -> NDArray[np.float32]:
        """The values of a tensor that is not quantized."""
        return self.tensors.read_finite(name).float().numpy()

    def values(self, name: str) -> NDArray[np.float32]:
        """The values of a tensor, dequantized if needed."""
        if (bits := self.bits(name)) is None:
            return self.array(name)
        integers = self.tensors.read(f"{name}.q")
        return dequantize_groups(
            unpack(integers) if bits == 4 else integers, self.tensors.read_finite(f"{name}.scale")
        ).numpy()

    def read_packed(self, names: Iterable[str]) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Integers and scales of quantized tensors of the same bits, concatenated along the outputs."""
        names = list(names)
        integers, scales = (
            np.concatenate([self.tensors.read_finite(f"{name}.{part}").numpy() for name in names])
            for part in ("q", "scale")
        )
        return integers, scales


def to_float16(name: str, array: NDArray[np.float32], instead: str) -> NDArray[np.float16]:
    """Raises UserError for values beyond float16's range; it names the precision to use ``instead``."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float16)
    if not np.isfinite(narrow).all():
        found = np.abs(array).max()
        raise UserError(f"expected {name} within float16's range, found {found:.3g}; use --precision {instead}")
    return narrow


def unpack_nibbles(integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packed pairs (out, in / 2), low nibble first -> integers from 0 to 15 (out, in), which stand for -8 to 7."""
    return np.stack([integers & 15, integers >> 4], -1).reshape(len(integers), -1)


def read_weights(artifact: Artifact) -> Weights:
    """Raises UserError for a damaged file and for tensors that are not the policy's."""
    manifest = artifact.manifest
    files = [artifact.file(name) for name in weight_files(manifest)]
    tensors = tensors_from_safetensors(files, str(artifact.path))
    wide = {name for name in tensors if tensors.dtype(name) == torch.float32}
    weights = Weights(tensors, manifest.quantization, frozenset(wide if manifest.dtype == "bfloat16" else ()))
    check_shapes(build_on_meta(manifest.policy, manifest.towers), weights.shapes(), str(artifact.path))
    return weights
