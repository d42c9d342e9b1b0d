"""The grid's integers as GGUF's quantized blocks: the same integers and scales, laid out as ggml reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def gguf_blocks(integers: NDArray[np.int8], scale: NDArray[np.float16], bits: int) -> NDArray[np.uint8]:
    """Integers (out, in), one scale for 32 of them (out, in / 32) -> rows of blocks (out, bytes).

    A block is its scale and then, of Q4_0, 16 bytes with elements 0 to 15 in the low halves and 16 to 31 in the high
    ones, offset 8; of Q8_0 (``bits`` 8) its 32 integers.
    """
    blocks: NDArray[Any] = integers.reshape(*scale.shape, 32)
    if bits == 4:
        nibbles = (blocks + 8).astype(np.uint8)
        blocks = nibbles[..., :16] | nibbles[..., 16:] << 4
    stored = np.ascontiguousarray(scale[..., None]).view(np.uint8)
    return np.concatenate([stored, blocks.view(np.uint8)], -1).reshape(len(integers), -1)
