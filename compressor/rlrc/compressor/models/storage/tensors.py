"""Tensors by name: shapes and types without reading data, and the data one tensor at a time."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlrc.checkpoint_folder import unreadable
from rlrc.compressor.models.nn.linear import EVERY, Rows, list_parts
from rlrc.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, each read or computed on access. ``meta``, ``shape`` and ``dtype`` read no data.

    ``origin`` names them in messages; ``file`` is "" for the model's weights, else the file's name (Part.file);
    ``paths`` are the files that contain them, if any.
    """

    def __init__(
        self,
        origin: str,
        stored: Mapping[str, Tensor],
        read: Callable[[str], Tensor] | None = None,
        file: str = "",
        paths: tuple[Path, ...] = (),
        aliases: Mapping[str, str] | None = None,
        computed: Mapping[str, Rows] | None = None,
    ) -> None:
        """``stored``: on the meta device if ``read`` returns the data; ``aliases``: names in the file -> names here.

        ``computed``: matrices that take memory when they are read. Layers read rows of them whenever they compute.
        """
        self.origin, self.file, self.paths, self.aliases = origin, file, paths, aliases or {}
        self._stored, self._read, self.computed = dict(stored), read, computed or {}
        self._states = [_file_state(path) for path in paths]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def rename(self, names: Mapping[str, str]) -> Tensors:
        """The same tensors under other names. ``names`` maps every name in the files to a new one.

        Raises UserError if two tensors would get the same name.
        """
        files = {new: old for old, new in names.items()}
        if len(files) < len(names):
            twice = next(new for old, new in names.items() if files[new] != old)
            raise UserError(
                f"expected one tensor {twice} in {self.origin}, found it with a prefix as well; save the model alone"
            )
        read = self._read
        stored = {new: self._stored[old] for new, old in files.items()}
        inner = None if read is None else lambda name: read(files[name])
        return Tensors(self.origin, stored, inner, self.file, self.paths, names)

    def meta(self, name: str) -> Tensor:
        """The tensor on the meta device: shape and dtype. Raises UserError if there is no such tensor."""
        if name not in self._stored:
            close = difflib.get_close_matches(name, self._stored, 1)
            found = f"none of {len(self._stored)}" + (f" (the nearest is {close[0]})" if close else "")
            raise UserError(f"expected the tensor {name} in {self.origin}, found {found}; is the folder complete?")
        return self._stored[name].to("meta")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.meta(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.meta(name).dtype

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError, naming the tensor, if it is missing or has another shape."""
        if self.shape(name) != shape:
            raise wrong_shape_error(f"tensor {name}", shape, self.shape(name), self.origin)

    def depth(self, prefix: str) -> int:
        """The number of blocks: their tensors' names are ``prefix``, the number 0, 1, ..., a dot, and the rest.

        Raises UserError if a number is missing.
        """
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        found = {int(match[1]) for name in self._stored if (match := pattern.match(name))}
        if missing := set(range(len(found))) - found:
            raise UserError(
                f"expected the blocks {prefix}0 to {max(found)} in {self.origin}, found no {prefix}{min(missing)}; "
                "is the folder complete?"
            )
        return len(found)

    def read(self, name: str) -> Tensor:
        """The data as stored. It may be a view of a mapped file, which takes no memory of its own."""
        self.meta(name)
        if name in self.computed:
            return self.computed[name](EVERY)
        return self._stored[name] if self._read is None else self._read(name)

    def parts(self, name: str) -> Iterator[Tensor]:
        """As ``read``; a matrix that is computed comes in some rows after the others."""
        if name not in self.computed:
            yield self.read(name)
            return
        for rows in list_parts(self.shape(name)):
            yield self.computed[name](rows)

    def states(self) -> str:
        """Names, sizes and times of the files when these tensors were opened."""
        return ", ".join(f"{path.name} {state}" for path, state in zip(self.paths, self._states, strict=True))

    def check_unchanged(self) -> None:
        """Raises UserError if one of the files has changed since these tensors were opened."""
        for path, state in zip(self.paths, self._states, strict=True):
            if _file_state(path) != state:
                raise UserError(
                    f"expected {path} as it was at the start, found a file that has changed meanwhile; run the command "
                    "again"
                )

    def read_finite(self, name: str) -> Tensor:
        """As ``read``. Raises UserError, naming the tensor, for nan or inf in it."""
        tensor = self.read(name)
        check_finite(tensor, name, self.origin)
        return tensor


def rows_of(tensors: Mapping[str, Tensor], name: str) -> Rows:
    """A function that reads rows of this matrix."""
    if isinstance(tensors, Tensors) and name in tensors.computed:
        return tensors.computed[name]
    return lambda rows: tensors[name][rows]


def _file_state(path: Path) -> tuple[int, int] | None:
    """Size, and time of the last change; None if the file is gone, which mapped tensors survive."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def largest_magnitude(tensor: Tensor) -> float:
    """The largest magnitude; nan or inf if the tensor contains one. One pass at memory bandwidth."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(abs(float(low)), abs(float(high)))


def check_finite(
    tensor: Tensor, name: str, origin: str, advice: str = "use an earlier checkpoint, or copy it again if it is sound"
) -> None:
    """Raises UserError for nan or inf in a tensor of floats."""
    if tensor.is_floating_point() and not isfinite(found := largest_magnitude(tensor)):
        raise UserError(f"expected finite numbers in the tensor {name} of {origin}, found {found}; {advice}")


def not_floats_error(name: str, found: object, origin: str) -> UserError:
    return UserError(
        f"expected floating-point numbers in the tensor {name} of {origin}, found {str(found).removeprefix('torch.')}: "
        "these weights are quantized; give the checkpoint that they were quantized from (run rlrc quantize later)"
    )


def wrong_shape_error(what: str, expected: object, found: object, origin: str) -> UserError:
    return UserError(
        f"expected {expected} for {what}, found {found} in {origin}; is its config.json (or --hints) of these weights?"
    )


def tensors_from_shapes(
    origin: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, file: str = ""
) -> Tensors:
    """Tensors without data, to derive geometries from."""
    stored = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    return Tensors(origin, stored, file=file)


def tensors_from_safetensors(
    files: Iterable[Path], origin: str, file: str = "", advice: str = "copy that file again"
) -> Tensors:
    """The tensors of one or several safetensors files, as views of the mapped files.

    Raises UserError with the ``advice`` for a damaged file.
    """
    stored, where = dict[str, Tensor](), dict[str, Path]()
    for path in files:
        try:
            with safe_open(path, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    tensor = opened.get_slice(name)
                    dtype = DTYPES.get(tensor.get_dtype())
                    if dtype is None:
                        raise not_floats_error(name, tensor.get_dtype(), origin)
                    stored[name] = torch.empty(tensor.get_shape(), dtype=dtype, device="meta")
                    where[name] = path
        except (OSError, SafetensorError) as error:
            raise unreadable("safetensors in", path, error, advice) from None

    @cache
    def mapped(path: Path) -> Any:
        opened: Any = safe_open(path, "pt")
        return opened.__enter__()  # released with the last of its tensors

    def read(name: str) -> Tensor:
        tensor: Tensor = mapped(where[name]).get_tensor(name)
        return tensor

    return Tensors(origin, stored, read, file, tuple(dict.fromkeys(where.values())))
