"""Columns of parquet files as numpy arrays and texts. Equivalent types are converted; others raise an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlrc.datasets.reading import translate_errors
from rlrc.errors import UserError

_BATCH = 32 << 20  # bytes of numbers that ``read_parts`` reads at a time


def translate_parquet_errors(file: Path) -> AbstractContextManager[None]:
    """Within this context, errors of pyarrow become a UserError that names the file."""
    return translate_errors("parquet file", file, pa.ArrowException)


@contextmanager
def open_parquet(file: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """An open parquet file. Raises UserError for a damaged file, and unless it has each of these columns once."""
    with translate_parquet_errors(file), pq.ParquetFile(file, memory_map=True) as parquet:
        check_columns(parquet, file, columns)
        yield parquet


def check_columns(parquet: pq.ParquetFile, file: Path, columns: Sequence[str]) -> None:
    names = parquet.schema_arrow.names
    for name in columns:
        if (found := names.count(name)) != 1:
            raise UserError(f"expected the column {name} in {file}, found {found or 'none'}; write the data set again")


def count_rows(file: Path) -> int:
    with open_parquet(file, ()) as parquet:
        return int(parquet.metadata.num_rows)


def read_table(file: Path, columns: Sequence[str]) -> pa.Table:
    with open_parquet(file, columns) as parquet:
        # pyarrow reads a name as a path into nested columns, so "a.b" also selects a column "a.b.c".
        return parquet.read(columns=list(columns)).select(list(columns))


def read_parts(file: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """A column of numbers in pieces of some megabytes, converted by ``to_numbers``."""
    size = max(1, _BATCH // (prod(shape) * 8))
    with open_parquet(file, [name]) as parquet:
        for batch in parquet.iter_batches(size, columns=[name]):
            yield to_numbers(pa.chunked_array([batch.column(batch.schema.names.index(name))]), name, file, dtype, shape)


def to_numbers(
    column: pa.ChunkedArray, name: str, file: Path, dtype: str, shape: tuple[int, ...] = (1,)
) -> NDArray[Any]:
    """A column of numbers as (rows, *shape), or (rows,) for the shape (1,).

    Any numeric type, including decimal and bool, is converted to ``dtype`` if values change by rounding to a float's
    precision at most. Lists may be nested like the shape, or flat. Raises UserError, which names file and column, for
    other types, other lengths, empty values and numbers that ``dtype`` cannot hold.
    """
    try:
        pieces = [_convert(_flatten(chunk, shape), np.dtype(dtype)) for chunk in column.chunks]
    except _Unfit as unfit:
        wanted = dtype if shape == (1,) else f"{dtype} {shape}"
        raise _make_error(wanted, name, file, str(unfit)) from None
    values = np.concatenate(pieces) if pieces else np.empty(0, dtype)
    return values.reshape(len(column), *(() if shape == (1,) else shape))


def to_texts(column: pa.ChunkedArray, name: str, file: Path) -> list[str | None]:
    """A column of strings. Raises UserError, which names file and column, for another type."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise _make_error("strings", name, file, str(kind))
    try:
        found: list[str | None] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise _make_error("strings in UTF-8", name, file, str(error)) from None
    return found


class _Unfit(Exception):
    """The message says what was found instead of the expected numbers."""


def _make_error(expected: str, name: str, file: Path, found: str) -> UserError:
    return UserError(
        f"expected {expected} in every row of the column {name} in {file}, found {found}; write the data set again"
    )


def _flatten(array: pa.Array, shape: tuple[int, ...]) -> pa.Array:
    """The numbers of all rows as one flat array."""
    lengths: list[int] = []
    count = len(array)
    while True:
        kind = array.type
        if isinstance(kind, pa.BaseExtensionType):  # tensors, stored as lists
            if getattr(kind, "permutation", None) not in (None, list(range(len(shape)))):
                raise _Unfit(str(kind))
            array = array.storage
        elif pa.types.is_dictionary(kind):
            array = array.dictionary_decode()
        elif not (_is_list(kind) or _is_number(kind)):
            raise _Unfit("empty values only" if pa.types.is_null(kind) else f"the type {kind}")
        elif array.null_count:
            raise _Unfit(f"{array.null_count} empty values")
        elif _is_list(kind):
            if len(array):
                found = pc.min_max(pc.list_value_length(array)).as_py()
                if found["min"] != found["max"]:
                    raise _Unfit(f"lists of {found['min']} to {found['max']} values")
                lengths.append(found["min"])
            array = array.flatten()
        else:
            break
    same = len(lengths) <= 1 or [n for n in lengths if n != 1] == [n for n in shape if n != 1]
    if count and (prod(lengths) != prod(shape) or not same):
        raise _Unfit(f"lists of {' x '.join(map(str, lengths))} values" if lengths else "single numbers")
    return array


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return any(one(kind) for one in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return any(one(kind) for one in (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal))


def _convert(array: pa.Array, dtype: np.dtype[Any]) -> NDArray[Any]:
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        converted = values.astype(dtype)
        changed = np.isfinite(values) & ~np.isfinite(converted) if dtype.kind == "f" else converted != values
    if changed.any():
        raise _Unfit(f"the {array.type} {values[changed][0]}")
    return converted
