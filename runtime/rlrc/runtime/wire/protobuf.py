"""The protobuf messages of LeRobot's protocol, whose fields are numbers or bytes. No compiler is needed.

    Observation { transfer_state = 1 (0 unknown, 1 begin, 2 middle, 3 end); data = 2 }
    PolicySetup { data = 1 }    Actions { data = 1 }    Empty { }

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from rlrc.errors import UserError

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # wire types
FIELDS = 64  # per message; LeRobot's have fewer


def fields(message: bytes) -> dict[int, int | bytes]:
    """A message's fields by number; of a repeated field, the last. Raises UserError for an invalid message."""
    found: dict[int, int | bytes] = {}
    try:
        place = 0
        for _ in range(FIELDS):
            if place == len(message):
                return found
            tag, place = _varint(message, place)
            if tag & 7 == VARINT:
                found[tag >> 3], place = _varint(message, place)
                continue
            if tag & 7 == BYTES:
                size, place = _varint(message, place)
            else:
                size = {FIXED_64: 8, FIXED_32: 4}[tag & 7]
            if size > len(message) - place:
                raise IndexError
            found[tag >> 3] = message[place : place + size]
            place += size
    except (IndexError, KeyError):
        pass
    raise UserError("expected one of LeRobot's messages, found something else; use LeRobot's client")


def data(message: bytes, number: int = 1) -> bytes:
    """The bytes of a field; empty if it is missing. Raises UserError."""
    found = fields(message).get(number, b"")
    if not isinstance(found, bytes):
        raise UserError(f"expected bytes as field {number}, found a number; use LeRobot's client")
    return found


def with_data(content: bytes) -> bytes:
    """A message with these bytes in field 1."""
    size, left = b"", len(content)
    while left >= 128:
        size, left = size + bytes((left & 127 | 128,)), left >> 7
    return b"\x0a" + size + bytes((left,)) + content


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Returns the number at ``place`` and the place after it."""
    number = 0
    for index in range(10):
        byte = message[place + index]
        number |= (byte & 127) << 7 * index
        if byte < 128:
            return number, place + index + 1
    raise IndexError
