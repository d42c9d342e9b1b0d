"""Turn errors of libraries that read a data set's files into one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlrc.checkpoint_folder import unreadable
from rlrc.errors import UserError


@contextmanager
def translate_errors(what: str, file: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn ``errors`` and OSError into a UserError: expected a readable ``what``."""
    foreign: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"expected the file {file}, found none; copy the data set again") from None
    except foreign as error:
        reason = str(getattr(error, "strerror", None) or error).split("\n")[0]
        raise make_error(what, file, reason or type(error).__name__) from None


def make_error(what: str, file: Path, reason: str) -> UserError:
    return unreadable(f"a readable {what}", file, reason, "copy the data set again")
