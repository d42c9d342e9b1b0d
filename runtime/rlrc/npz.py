"""Reading and writing .npz files of plain arrays, without pickle and without incomplete files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.folders import replace_file


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays by name. Raises UserError for a file that is missing, damaged or holds Python objects."""
    try:
        # Opened here because numpy leaves a damaged file open.
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(
            f"expected an .npz of plain arrays at {path}, found: {reason}; write it with numpy.savez"
        ) from None


def write_npz(path: Path, **arrays: NDArray[Any]) -> None:
    """Replaces ``path`` once the new file is complete. Creates missing folders."""
    with replace_file(path) as partial, partial.open("xb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
