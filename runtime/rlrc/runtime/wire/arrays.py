"""openpi's messages: msgpack, with maps for arrays and numpy scalars.

    {b"__ndarray__": true, b"data": C-order bytes, b"dtype": "<f4", b"shape": [2, 3]}
    {b"__npgeneric__": true, b"data": a number, b"dtype": "<f4"}

The package msgpack-numpy writes different maps; these are refused. All declared sizes are checked against the size of
the message before anything is allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from rlrc.errors import UserError

DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")  # no objects, records, strings or complex numbers
MAX_DIMENSIONS = 8
MAX_CONTAINERS = 1000  # maps and lists per message; even an empty one takes much more memory than its byte
MAX_ENTRIES = 4096  # per map or list

_ADVICE = "use openpi_client.msgpack_numpy"


def pack(message: Any) -> bytes:
    """Raises UserError unless the message consists of numbers, text, arrays of numbers, dicts and lists."""
    try:
        packed: bytes = msgpack.packb(message, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"expected numbers, text and arrays to send, found: {error}; leave it out") from None
    return packed


def unpack(message: bytes, from_map: Callable[[dict[Any, Any]], Any] | None = None, advice: str = _ADVICE) -> Any:
    """Raises UserError for invalid messages, and for arrays whose declared size differs from their data.

    ``from_map``: converts the maps of another protocol; ``advice``: what its clients should use.
    """
    left, stands_for = MAX_CONTAINERS, from_map or _decode_map

    def spend() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {MAX_CONTAINERS} maps and lists")

    def on_map(values: dict[Any, Any]) -> Any:
        spend()
        return stands_for(values)

    def on_list(values: list[Any]) -> list[Any]:
        spend()
        return values

    try:
        return msgpack.unpackb(
            message,
            object_hook=on_map,
            list_hook=on_list,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"expected a msgpack message, found: {why}; {advice}") from None


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and not DTYPE.fullmatch(value.dtype.str):
        raise TypeError(f"{value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(type(value).__name__)


def _decode_map(values: dict[Any, Any]) -> Any:
    if b"__ndarray__" in values:
        data, shape, dtype = values.get(b"data"), _shape(values), _dtype(values)
        if not isinstance(data, bytes):
            raise UserError(f"expected an array's data as bytes, found {type(data).__name__}; {_ADVICE}")
        if (size := math.prod(shape) * dtype.itemsize) != len(data):
            raise UserError(f"expected {size} bytes for {dtype} {shape}, found {len(data)}; {_ADVICE}")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in values:
        number, dtype = values.get(b"data"), _dtype(values)
        if not isinstance(number, (bool, int, float)):
            raise UserError(f"expected a number as data of a numpy scalar, found {type(number).__name__}; {_ADVICE}")
        try:
            with np.errstate(over="ignore"):  # to infinity, which is detected later
                return dtype.type(number)
        except OverflowError as error:
            raise UserError(f"expected a number that {dtype} holds, found: {error}; {_ADVICE}") from None
    for key in (b"nd", "nd", b"complex", "complex"):
        if key in values:
            raise UserError(f"expected openpi's encoding of arrays, found msgpack-numpy's; {_ADVICE}")
    return values


def _dtype(values: dict[Any, Any]) -> np.dtype[Any]:
    found = values.get(b"dtype")
    if not isinstance(found, str) or not DTYPE.fullmatch(found):
        raise UserError(f"expected an array of numbers, found dtype {str(found)[:40]!r}; send floats or integers")
    return np.dtype(found)


def _shape(values: dict[Any, Any]) -> tuple[int, ...]:
    found = values.get(b"shape")
    if (
        not isinstance(found, list)
        or len(found) > MAX_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in found)
    ):
        raise UserError(
            f"expected an array's shape as up to {MAX_DIMENSIONS} sizes, found {str(found)[:40]!a}; {_ADVICE}"
        )
    return tuple(found)
