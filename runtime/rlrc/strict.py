"""Frozen dataclasses to JSON values and back, strictly, driven by the type hints.

Nothing is guessed or dropped: an unknown key, a missing key, a wrong type and a number that is not finite are errors
that name the path of the key, such as ``policy.cameras[0].height``. A key may be missing only if its field has a
default, so that a later version can add fields. Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from rlrc.errors import UserError

if sys.version_info >= (3, 11):
    from importlib.resources.abc import Traversable

    import tomllib
else:
    from importlib.abc import Traversable

    import tomli as tomllib

T = TypeVar("T")

_NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a number", type(None): "null"}


class StrictError(UserError):
    """A value that does not fit the dataclass; the message names the path of the key."""


def parse(text: bytes) -> Any:
    """The values of a JSON text. Raises StrictError for broken JSON, keys that occur twice, NaN and infinity."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite)
    except RecursionError:
        raise StrictError("expected JSON, found endless nesting; copy the file again") from None
    except StrictError:
        raise
    except ValueError as error:  # broken syntax or broken UTF-8
        raise StrictError(f"expected JSON, found: {error}; copy the file again") from None


def read_toml(kind: type[T], file: Path | Traversable, expected: str = "", advice: str = "correct it") -> T:
    """The ``kind`` (a frozen dataclass, or a dict type) that a TOML file describes, with or without a byte order mark.

    ``expected`` and ``advice`` complete the error messages. Raises StrictError for tables that do not fit ``kind``,
    UserError for a file that cannot be read or is not TOML.
    """
    try:
        return decode(kind, tomllib.loads(file.read_bytes().decode("utf-8-sig")))
    except OSError as error:
        expected = expected or f"a TOML file at {file}"
        raise UserError(f"expected {expected}, found: {error.strerror}; {advice}") from None
    except StrictError as error:
        raise StrictError(f"{file}: {error}; {advice}") from None
    except RecursionError:
        raise UserError(f"expected TOML in {file}, found: endless nesting; {advice}") from None
    except ValueError as error:  # broken syntax or broken UTF-8
        raise UserError(f"expected TOML in {file}, found: {error}; {advice}") from None


def encode(value: object, where: str = "") -> Any:
    """A dataclass, or a value of one of its fields, as dicts, lists, strings, finite numbers, booleans and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(getattr(value, field.name), _key(where, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {_text(key, where): encode(item, _key(where, key)) for key, item in value.items()}
    return _scalar(value, where)


def decode(kind: type[T], value: object, where: str = "") -> T:
    """The ``kind`` that a JSON value describes. Raises StrictError."""
    result: T = _decode(kind, value, where)
    return result


def check_keys(value: dict[str, Any], known: Collection[str], where: str = "") -> None:
    """Raises StrictError for a key that is not known."""
    for key in value:
        if key not in known:
            raise StrictError(
                f"expected the keys {', '.join(known)} at {where or 'the top'}, found {_key(where, key)}, "
                "which is unknown"
            )


def check_distinct(sources: Mapping[str, Hashable], source: str, what: str, where: str) -> None:
    """Raises UserError where two names have the same source: two cameras one key, two dimensions one state entry.

    ``source`` and ``what`` are the nouns for the message; ``where`` is the file or option to correct.
    """
    first: dict[Hashable, str] = {}
    for name, end in sources.items():
        if end in first:
            shown = ".".join(end) if isinstance(end, tuple) else end
            raise UserError(
                f"expected every {source} for one of the {what}, found {shown} for {first[end]} and {name}; "
                f"correct {where}"
            )
        first[end] = name


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _plain(value, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise _mismatch(where, "one of " + ", ".join(repr(choice) for choice in arguments), value)
        return value
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {_text(key, where): _decode(arguments[1], item, _key(where, key)) for key, item in value.items()}
    if kind not in _NAMES:
        raise TypeError(f"{where}: the strict reader knows no {kind!r}")
    if kind is float and type(value) is int:  # JSON writers drop the ".0"
        return float(value)
    if type(value) is not kind:  # not isinstance: True is no integer
        raise _mismatch(where, _NAMES[kind], value)
    return _scalar(value, where)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, f"an object with the keys of {kind.__name__}", value)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    check_keys(value, fields, where)
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if name not in value and (field.default, field.default_factory) == missing:
            raise StrictError(f"expected the key {_key(where, name)}, found none")
    hints = _hints(kind)
    return kind(**{name: _decode(hints[name], item, _key(where, name)) for name, item in value.items()})


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mismatch(where, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise StrictError(f"expected a list of length {len(arguments)} at {where}, found length {len(value)}")
    return tuple(
        _decode(kind, item, f"{where}[{index}]")
        for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first member that fits. With a single member besides None, its own more specific error is raised."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others[:-1]:
        try:
            return _decode(kind, value, where)
        except StrictError:
            continue
    try:
        return _decode(others[-1], value, where)
    except StrictError:
        if len(others) == 1:
            raise
        raise _mismatch(where, " or ".join(_NAMES.get(kind, str(kind)) for kind in kinds), value) from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise StrictError(f"expected every key once, found one twice among {', '.join(key for key, _ in pairs)}")
    return values


def _not_finite(text: str) -> NoReturn:
    raise StrictError(f"expected finite numbers, found {text}")


def _plain(value: Any, where: str) -> Any:
    """A copy of any JSON value."""
    if isinstance(value, list):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {_text(key, where): _plain(item, _key(where, key)) for key, item in value.items()}
    return _scalar(value, where)


def _scalar(value: Any, where: str) -> Any:
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise _mismatch(where, "a string, number, boolean, null, list or object", value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _mismatch(where, "a finite number", value)
    return value


def _text(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise _mismatch(where, "keys that are strings", key)
    return key


def _key(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _mismatch(where: str, expected: str, found: Any) -> StrictError:
    text = repr(found)
    return StrictError(
        f"expected {expected} at {where or 'the top'}, found {text if len(text) <= 60 else text[:57] + '...'}"
    )
