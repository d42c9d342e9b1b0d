"""Quantized weights as GGUF blocks: the same integers and scales in the layout of ggml."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack_blocks(integers: NDArray[np.int8], scale: NDArray[np.float16], bits: int) -> NDArray[np.uint8]:
    """Integers (out, in) with a scale for every 32 of them (out, in / 32) -> rows of blocks (out, bytes).

    A block starts with its scale. In Q4_0 (``bits`` 4), 16 bytes follow with elements 0 to 15 in the low nibbles and 16
    to 31 in the high ones, offset 8; in Q8_0 (``bits`` 8) the 32 integers.
    """
    blocks: NDArray[Any] = integers.reshape(*scale.shape, 32)
    if bits == 4:
        nibbles = (blocks + 8).astype(np.uint8)
        blocks = nibbles[..., :16] | nibbles[..., 16:] << 4
    stored = np.ascontiguousarray(scale[..., None]).view(np.uint8)
    return np.concatenate([stored, blocks.view(np.uint8)], -1).reshape(len(integers), -1)
