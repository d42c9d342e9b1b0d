"""Reads and writes LeRobot's pickles without pickle.load, which runs code of the sender (CVE-2026-25874).

``read`` interprets only the opcodes of plain data, arrays and LeRobot's dataclasses. Classes and functions stay names,
restricted to a list; a call becomes a ``Call``, and ``array`` converts those of numpy. Nothing is imported or executed,
and pickletools checks lengths against the data before anything is allocated.
"""

from __future__ import annotations

import math
import pickle  # only for its opcodes
import pickletools
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.wire.arrays import DTYPE, MAX_DIMENSIONS

MAX_OPCODES = 10_000  # per message; a robot with a hundred joints needs a tenth
ADVICE = "use LeRobot's robot client, with observations of numbers, texts and numpy arrays"

LEROBOT = ("lerobot.async_inference.helpers", "lerobot.scripts.server.helpers")  # current and early versions


class Name(NamedTuple):
    """A class or function."""

    module: str
    name: str


@dataclass
class Call:
    """A call in a pickle, and the state for its result."""

    function: Name
    arguments: tuple[Any, ...]
    state: Any = None


NUMPY = ("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")
NAMES = frozenset(
    [Name("numpy", "ndarray"), Name("numpy", "dtype")]
    + [Name(f"{core}.{module}", name) for core in ("numpy.core", "numpy._core") for module, name in NUMPY]
    + [Name(module, name) for module in LEROBOT for name in ("RemotePolicyConfig", "TimedObservation")]
)
PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(data: bytes) -> Any:
    """The value of a pickle, with ``Call`` for calls.

    Raises UserError for invalid pickles, other opcodes, and names that are not in ``NAMES``.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_OPCODES:
                raise UserError(f"expected up to {MAX_OPCODES} opcodes, found more; {ADVICE}")
            machine.do(opcode.name, argument)
        (value,) = machine.stack
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        why = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"expected a pickle as LeRobot's client writes it, found: {why!a}; {ADVICE}") from None
    return value


class _Machine:
    """The pickle machine: a stack with marks, and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def do(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in PLAIN:
            stack.append(argument)
        elif opcode in TEXTS:
            argument.encode()  # raises for lone surrogates
            stack.append(argument)
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in TUPLES:
            stack.append(tuple(self._pop(TUPLES[opcode])))
        elif opcode in ("PROTO", "FRAME", "STOP"):
            pass
        elif opcode == "MARK":
            self._marks.append(len(stack))
        elif opcode in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if opcode == "EMPTY_LIST" else {})
        elif opcode == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif opcode in ("APPEND", "APPENDS"):
            items = self._pop(1) if opcode == "APPEND" else self._since_mark()
            self._top(list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if opcode == "SETITEM" else self._since_mark()
            self._set(self._top(dict), items)
        elif opcode in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError("a reference to nothing")
            stack.append(self._memo[argument])
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            module, name = argument.split(" ") if opcode == "GLOBAL" else self._pop(2)
            stack.append(_check_name(module, name))
        elif opcode in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            if not isinstance(function, Name) or type(arguments) is not tuple:
                raise ValueError("a call of what is no function")
            stack.append(Call(function, arguments))
        elif opcode == "BUILD":
            (state,) = self._pop(1)
            self._top(Call).state = state
        else:
            raise UserError(f"expected a pickle of plain data, found the opcode {opcode}; {ADVICE}")

    def _pop(self, number: int) -> list[Any]:
        floor = self._marks[-1] if self._marks else 0
        if len(self.stack) - floor < number:
            raise ValueError("nothing on the stack")
        popped = self.stack[-number:]
        del self.stack[-number:]
        return popped

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        popped = self.stack[mark:]
        del self.stack[mark:]
        return popped

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"no {kind.__name__} to add to")
        return self.stack[-1]

    def _set(self, values: dict[str, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # hashes of text, unlike numbers, cannot be made to collide
                raise ValueError(f"a key that is a {type(key).__name__}, not text")
            values[key] = value


def _check_name(module: Any, name: Any) -> Name:
    if (module, name) not in NAMES:
        found = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a name that is no text"
        raise UserError(f"expected only numpy's arrays and LeRobot's messages, found {found[:80]!a}; {ADVICE}")
    return Name(module, name)


def array(value: Any) -> NDArray[Any]:
    """The array or scalar of a Call of numpy. Raises UserError."""
    if not isinstance(value, Call):
        raise UserError(f"expected a numpy array, found {type(value).__name__}; {ADVICE}")
    axes: Any = ()
    try:
        if value.function.name == "_reconstruct":
            _, shape, dtype, fortran, raw = value.state
            order = "F" if fortran else "C"
        elif value.function.name == "_frombuffer":
            raw, dtype, shape, order, *axes = value.arguments
        elif value.function.name == "scalar":
            (dtype, raw), shape, order = value.arguments, (), "C"
        else:
            raise TypeError
    except (TypeError, ValueError):
        raise UserError(f"expected a numpy array as numpy pickles it, found another form; {ADVICE}") from None
    if order != "K":
        return _array(raw, _dtype(dtype), shape, order)
    transposed = _array(raw, _dtype(dtype), shape, "C")
    (axes,) = axes if len(axes) == 1 and type(axes[0]) is tuple else ((),)
    if not all(type(axis) is int for axis in axes) or sorted(axes) != list(range(transposed.ndim)):
        raise UserError(f"expected an order of the array's axes, found another; {ADVICE}")
    found: NDArray[Any] = transposed.transpose(axes)
    return found


def _array(raw: Any, dtype: np.dtype[Any], shape: Any, order: Any) -> NDArray[Any]:
    sizes = shape if isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS else (None,)
    if not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
        raise UserError(f"expected an array's shape as up to {MAX_DIMENSIONS} sizes, found another; {ADVICE}")
    if order not in ("C", "F") or not isinstance(raw, (bytes, bytearray)):
        raise UserError(f"expected an array in C's order or Fortran's, found another; {ADVICE}")
    if (size := math.prod(sizes) * dtype.itemsize) != len(raw):
        raise UserError(f"expected {size} bytes for {dtype} {sizes}, found {len(raw)}; {ADVICE}")
    try:
        return np.frombuffer(raw, dtype).reshape(sizes, order=order)
    except ValueError:  # an empty array with sizes that numpy refuses
        raise UserError(f"expected an array's shape, found {sizes}, which numpy does not take; {ADVICE}") from None


def _dtype(value: Any) -> np.dtype[Any]:
    """numpy pickles a dtype as dtype("f4", False, True) with the state (3, "<", ...)."""
    kind = order = None
    if isinstance(value, Call) and value.function == Name("numpy", "dtype") and value.arguments:
        kind, state = value.arguments[0], value.state
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    found = f"{order}{kind}" if isinstance(order, str) and isinstance(kind, str) else ""
    if not DTYPE.fullmatch(found):
        raise UserError(f"expected an array of numbers, found dtype {found[:20]!a}; {ADVICE}")
    return np.dtype(found)


def write_actions(module: str, timestamp: float, step_s: float, timestep: int, actions: NDArray[np.float32]) -> bytes:
    """A chunk (horizon, dim) as a pickled list of ``module``'s TimedAction, for LeRobot's client.

    The client's torch creates the actions (dim,) from lists of numbers; torch is not needed here.
    """
    written = [pickle.PROTO, b"\x03", pickle.EMPTY_LIST, pickle.MARK]
    for index, action in enumerate(actions.tolist()):
        written += [
            _write_global(module, "TimedAction"),
            pickle.EMPTY_TUPLE,
            pickle.NEWOBJ,
            pickle.EMPTY_DICT,
            pickle.MARK,
        ]
        written += [_write_text("timestamp"), _write_number(timestamp + index * step_s)]
        written += [_write_text("timestep"), pickle.BININT, struct.pack("<i", timestep + index)]
        written += [_write_text("action"), _write_global("torch", "tensor"), pickle.EMPTY_LIST, pickle.MARK]
        written += [
            *map(_write_number, action),
            pickle.APPENDS,
            pickle.TUPLE1,
            pickle.REDUCE,
            pickle.SETITEMS,
            pickle.BUILD,
        ]
    return b"".join([*written, pickle.APPENDS, pickle.STOP])


def _write_global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _write_text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


def _write_number(number: float) -> bytes:
    return pickle.BINFLOAT + struct.pack(">d", number)
