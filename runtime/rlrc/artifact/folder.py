"""Artifacts on disk: read strictly, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from rlrc.artifact.consistency import check_consistent, is_inside
from rlrc.artifact.spec import FORMAT_VERSION, FileSpec, Manifest
from rlrc.checkpoint_folder import describe_path
from rlrc.errors import UserError
from rlrc.folders import create_folder, sha256, sync
from rlrc.strict import StrictError, decode, encode, parse

MANIFEST = "manifest.json"
GOLDEN = "golden.npz"  # observations with the torch policy's actions
TOKENIZER = "tokenizer/tokenizer.json"


class ArtifactError(UserError):
    """An artifact that is incomplete, damaged or does not match its manifest."""


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact. ``digest`` is the sha256 of manifest.json, which pins the hash of every other file."""

    path: Path
    manifest: Manifest
    digest: str

    def file(self, relative: str) -> Path:
        """The path of a file that the manifest lists. Raises ArtifactError for any other."""
        if relative not in self.manifest.files:
            listed = ", ".join(sorted(self.manifest.files)) or "no files"
            raise ArtifactError(
                f"expected {relative} in the artifact {self.path}, found {listed}; run the stage that creates it first"
            )
        return self.path / relative

    def verify(self, *prefixes: str) -> None:
        """Checks the sha256 of these files and folders. Raises ArtifactError."""
        for relative, spec in self.manifest.files.items():
            if any(PurePosixPath(relative).is_relative_to(prefix) for prefix in prefixes):
                _check_file(self.path / relative, spec, hashed=True)


def load(path: str | Path, verify: Collection[str] | None = None) -> Artifact:
    """Reads and checks an artifact.

    The presence and size of every file are always checked. ``verify``: the files and folders ("graphs", "golden.npz")
    whose sha256 is checked as well; None: all. Raises ArtifactError.
    """
    path = Path(path)
    verify = (verify,) if isinstance(verify, str) else verify
    if not path.is_dir():
        raise ArtifactError(f"expected an artifact folder at {path}, found {describe_path(path)}")
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        missing = f"expected {path / MANIFEST}, found: No such file or directory"
        raise ArtifactError(f"{missing}; {path} is {describe_path(path)}") from None
    except OSError as error:
        raise ArtifactError(f"expected {path / MANIFEST}, found: {error.strerror}; make it readable") from None
    try:
        manifest = from_json(parse(text))
        for relative, spec in manifest.files.items():
            hashed = verify is None or any(PurePosixPath(relative).is_relative_to(prefix) for prefix in verify)
            _check_file(path / relative, spec, hashed)
    except OSError as error:
        raise ArtifactError(f"expected readable files in {path}, found: {error}; fix the permissions") from None
    except UserError as error:
        raise ArtifactError(f"{path}: {error}") from None
    return Artifact(path, manifest, hashlib.sha256(text).hexdigest())


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values. Raises ArtifactError for what does not fit, such as NaN or an array."""
    try:
        values: dict[str, Any] = encode(manifest)
    except StrictError as error:
        raise ArtifactError(str(error)) from None
    from_json(values)
    return values


def from_json(values: Any) -> Manifest:
    """The manifest that these values describe. Raises ArtifactError that names the key of what does not fit."""
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise ArtifactError(
            f"expected an object with a format_version from 1 to {FORMAT_VERSION}, found format_version {version!r}"
        )
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"expected a format_version up to {FORMAT_VERSION}, found {version}, which is newer; upgrade rlrc"
        )
    try:
        if "files" not in values:  # the field has a default for stages, but a manifest must list its files
            raise StrictError("expected the key files, found none")
        manifest = decode(Manifest, values)
        check_consistent(manifest)
    except StrictError as error:
        raise ArtifactError(f"{error}; make the artifact again with this version of rlrc") from None
    return manifest


class Draft:
    """An artifact being written, in a temporary folder ``path``. The caller fills it and calls ``finish`` once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished = False
        self._inherited: dict[str, FileSpec] = {}

    def file(self, relative: str) -> Path:
        """Where to write this file; creates its folder. Raises RuntimeError for an inherited one, maybe a hard link."""
        if relative in self._inherited:
            raise RuntimeError(
                f"{relative} is inherited and may be a hard link into the parent; do not inherit what you rewrite"
            )
        if not is_inside(relative):
            raise RuntimeError(f"expected a plain relative path, found {relative!r}")
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def inherit(self, parent: Artifact, *prefixes: str) -> None:
        """Takes these files and folders from the parent unchanged: hard-linked where possible, else copied."""
        for relative, spec in parent.manifest.files.items():
            if any(PurePosixPath(relative).is_relative_to(prefix) for prefix in prefixes):
                target = self.file(relative)
                try:
                    os.link(parent.path / relative, target)
                except OSError:
                    shutil.copyfile(parent.path / relative, target)
                self._inherited[relative] = spec

    def finish(self, manifest: Manifest) -> Manifest:
        """Hashes and syncs all files, then writes manifest.json. Returns the manifest with ``files`` filled in.

        Raises ArtifactError if the manifest is inconsistent or an inherited file does not match its parent's manifest.
        """
        if self.finished:
            raise RuntimeError("finish() was called twice")
        for relative, spec in self._inherited.items():
            _check_file(self.path / relative, spec, hashed=True)
        paths = sorted(path for path in self.path.rglob("*") if not path.is_dir())
        files = {path.relative_to(self.path).as_posix(): FileSpec(sha256(path), path.stat().st_size) for path in paths}
        manifest = replace(manifest, files=files)
        text = json.dumps(to_json(manifest), indent=1, allow_nan=False) + "\n"
        for path in [*paths, *(folder for folder in self.path.rglob("*") if folder.is_dir())]:
            sync(path)
        (self.path / MANIFEST).write_text(text, encoding="utf-8")
        sync(self.path / MANIFEST)
        sync(self.path)
        self.finished = True
        return manifest


@contextmanager
def create_artifact(out: str | Path) -> Iterator[Draft]:
    """Writes a new artifact, which appears at ``out`` complete or not at all (see rlrc.folders.create_folder)."""
    with create_folder(out) as path:
        draft = Draft(path)
        yield draft
        if not draft.finished:
            raise RuntimeError(f"finish() was not called for the artifact {out}")


def _check_file(path: Path, spec: FileSpec, hashed: bool) -> None:
    if not path.is_file():
        raise ArtifactError(f"expected the file {path}, found none; copy the artifact again")
    if path.stat().st_size != spec.size:
        raise ArtifactError(
            f"expected {spec.size} bytes in {path}, found {path.stat().st_size}; copy the artifact again"
        )
    if hashed and (found := sha256(path)) != spec.sha256:
        raise ArtifactError(
            f"expected sha256 {spec.sha256[:12]}... of {path}, found {found[:12]}...; copy the artifact again"
        )


WEIGHTS = "weights/model.safetensors"
"""of a policy whose weights fit in one file; shards of larger ones: see ``weight_files``"""


def weight_files(manifest: Manifest) -> tuple[str, ...]:
    """The manifest's files with trainable weights, in order: ``WEIGHTS``, or its shards; none without weights."""
    folder = PurePosixPath(WEIGHTS).parent
    names = [name for name in manifest.files if PurePosixPath(name).parent == folder]
    return tuple(sorted(name for name in names if name.endswith(".safetensors")))
