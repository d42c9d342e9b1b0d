"""Output folders and files that appear whole or not at all. Needs the standard library only."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlrc.errors import UserError


def check_output(out: str | Path) -> None:
    """Refuses an output that exists or cannot be written, before any work is done. Raises UserError; leaves nothing."""
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise UserError(f"expected a new output, found {out} already there; choose another name or remove it")
    parent = next(folder for folder in out.parents if os.path.lexists(folder))
    try:
        # Really writing is the only honest probe: root passes every permission check, and fails on a read-only disk.
        probe = tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=parent)
    except OSError as error:
        raise UserError(
            f"expected to write to {parent}, found: {error.strerror}; choose another place for {out.name}"
        ) from None
    with suppress(OSError):  # another writer of this output may have cleared it already
        os.rmdir(probe)


@contextmanager
def appearing(out: str | Path) -> Iterator[Path]:
    """Yields a new folder that becomes ``out`` in one rename when the block ends, and is removed when the block raises.

    It lies at ``.NAME.partial-PID`` beside ``out``, locked while its writer lives; what a killed writer left is removed
    by the next one. The block syncs its own files. Raises UserError if ``out`` exists or cannot be written.
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
        with suppress(OSError):  # a disk without locks: stale folders stay there, nothing else is lost
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
        _publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in created:
            with suppress(OSError):  # not empty: somebody else uses it by now
                folder.rmdir()
        raise
    finally:
        os.close(lock)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new file beside ``path`` that takes its place when the block ends, and is removed when it raises.

    Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """The hash of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
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
            f"expected a new output, found that {out} appeared meanwhile ({error.strerror}); run again"
        ) from None
    sync(out.parent)


def _clear_stale(out: Path) -> None:
    """Removes the folders of dead writers. A lock says who lives: process numbers repeat, above all in containers."""
    for path in out.parent.iterdir():
        if path.name.startswith(f".{out.name}.partial-") and path.is_dir():
            # An error means that its writer lives, that another process clears it, or that this disk knows no locks.
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                finally:
                    os.close(handle)
