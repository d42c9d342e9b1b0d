"""Output folders and files that appear complete or not at all. Needs the standard library only.

A full disk shows as an OSError with or without its number, or as a library's own exception that quotes the system.
``storage_failure`` recognises these, and ``translate_storage_errors`` turns them into one line.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlrc.errors import UserError

# By error number of a failed write: the advice.
STORAGE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EFBIG: "choose a disk, or a limit (ulimit -f), that allows larger files",
    errno.EROFS: "choose a writable folder",
    errno.EIO: "check the disk",
}
NUMBERED = r"\(os error (\d+)\)"  # Rust: safetensors, tokenizers
UNNUMBERED = r"PytorchStreamWriter|inline_container\.cc|\d+ requested and \d+ written"  # torch, numpy's tofile


def storage_failure(error: BaseException | None) -> int | None:
    """The error number (a key of STORAGE) if the error comes from a failed write; None for any other error."""
    guess = None
    while error is not None:
        number: int | None = getattr(error, "errno", None)
        if found := re.search(NUMBERED, str(error)):
            number = int(found[1])
        if number in STORAGE:
            return number
        if re.search(UNNUMBERED, str(error)):
            guess = errno.ENOSPC  # unless its cause is more specific
        error = error.__cause__ or error.__context__
    return guess


def storage_message(error: BaseException, path: object) -> str | None:
    """The message for the user if writing ``path`` failed; None for any other error."""
    if (number := storage_failure(error)) is None:
        return None
    return f"expected to write {path}, found: {os.strerror(number)}; {STORAGE[number]}, and run the same command again"


@contextmanager
def translate_storage_errors(path: Path) -> Iterator[None]:
    """Raises UserError where writing into ``path`` fails within the context."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (message := storage_message(error, path)) is None:
            raise
        raise UserError(message) from None


def check_output(out: str | Path) -> None:
    """Raises UserError for an output that exists or cannot be written, before any work is done. Leaves no file."""
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise UserError(f"expected a new output, found {out} already there; choose another name or remove it")
    parent = next(folder for folder in out.parents if os.path.lexists(folder))
    try:
        # Only a real write is a reliable test: root passes every permission check but fails on a read-only disk. A file
        # without a name leaves nothing behind, even if this process is killed.
        with suppress(FileNotFoundError):
            os.lstat(parent / f".{out.name}.partial-00000000")  # too long a name?
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(
            f"expected to write to {parent}, found: {error.strerror}; choose another place for {out.name}"
        ) from None


@contextmanager
def create_folder(out: str | Path) -> Iterator[Path]:
    """Yields a new folder that becomes ``out`` in one rename when the block ends, and is removed when the block raises.

    Until then it is ``.NAME.partial-PID`` next to ``out``, locked while its writer runs. The next writer removes what a
    killed one left. The block syncs its own files. Raises UserError if ``out`` exists or cannot be written, or the disk
    is full.
    """
    out = Path(os.path.abspath(out))
    check_output(out)
    created = [folder for folder in out.parents if not folder.exists()]
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(out)
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(
            f"expected to make {partial}, found: {error.strerror}; does another process write {out.name}?"
        ) from None
    try:
        with suppress(OSError):  # a disk without locks: stale folders stay there
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with translate_storage_errors(out):
            yield partial
            _publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in created:
            with suppress(OSError):  # not empty: another process uses it
                folder.rmdir()
        raise
    finally:
        os.close(lock)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a new file next to ``path`` that replaces it when the block ends, and is removed when the block raises.

    Creates missing folders. Raises UserError if the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with translate_storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal. The file may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(partial: Path, out: Path) -> None:
    try:
        os.rename(partial, out)
    except OSError as error:
        raise UserError(
            f"expected a new output, found that {out} was created meanwhile ({error.strerror}); run again"
        ) from None
    sync(out.parent)


def _clear_stale(out: Path) -> None:
    """Removes the folders of dead writers. Locks show which still run: process ids repeat, mainly in containers."""
    for path in out.parent.iterdir():
        if path.name.startswith(f".{out.name}.partial-") and path.is_dir():
            # An error: its writer runs, another process removes it, or this disk has no locks.
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                finally:
                    os.close(handle)
