"""Copies an artifact to the robot's computer with resume, checks its hashes, tries it there, then makes it current.

    FOLDER/incoming/DIGEST/     a partial copy; an interrupted copy continues here
    FOLDER/artifacts/DIGEST/    complete artifacts, every file with the sha256 of the manifest
    FOLDER/current              a link to the artifact in use, changed by one rename
    FOLDER/verified             digests in the order in which they passed the trial

DIGEST is that of the manifest, which contains the hash of every other file. A rollback makes the newest other verified
artifact current.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from shlex import quote
from typing import Any

from rlrc import artifact as artifacts
from rlrc.artifact import MANIFEST, Artifact
from rlrc.errors import UserError
from rlrc.folders import sha256
from rlrc.jetson.board.remote import ConnectionLost, Shell

FOLDER = "/var/lib/rlrc"
SHORT = 16  # characters of a digest that name it
TRIES, PAUSE_S = 5, 2.0  # of a connection that is lost; the pause doubles
KEPT = 3
ROOM = 64 * 2**20

Watch = Callable[[str, int], None]
"""Called with a file's name and the number of its bytes on the other side."""


class TrialFailed(Exception):
    """The artifact is complete on the board, but does not work there. The current artifact has not changed."""


@dataclass
class RemoteFolder:
    """The folder on the robot's computer."""

    shell: Shell
    folder: str = FOLDER
    pause: Callable[[float], None] = field(default=time.sleep)

    def path(self, *parts: str) -> str:
        """A path below the folder, quoted for the remote shell."""
        return quote(str(PurePosixPath(self.folder, *parts)))

    def run(self, command: str, text: str | None = None) -> str:
        """Raises UserError for a command that fails, and for a connection that stays lost."""
        output: str = self.retry(lambda: self.shell.run(command, text))
        return output

    def retry(self, act: Callable[[], Any]) -> Any:
        seconds = PAUSE_S
        for left in reversed(range(TRIES)):
            try:
                return act()
            except ConnectionLost as error:
                if not left:
                    raise UserError(
                        f"expected {self.shell.where} to answer, found: {error}; run the same command again; it "
                        "continues where it stopped"
                    ) from None
                self.pause(seconds)
                seconds *= 2
        raise AssertionError

    def digests(self) -> set[str]:
        return set(self.run(f"ls {self.path('artifacts')} 2>/dev/null || true").split())

    def current(self) -> str | None:
        """The digest of the artifact in use; None if there is none."""
        target = self.run(f"readlink {self.path('current')} || true").strip()
        return PurePosixPath(target).name or None

    def verified(self) -> list[str]:
        """Verified digests that still exist, oldest first."""
        existing, passed = self.digests(), self.run(f"cat {self.path('verified')} 2>/dev/null || true").split()
        return [digest for digest in dict.fromkeys(reversed(passed)) if digest in existing][::-1]


def copy(artifact: Artifact, place: RemoteFolder, watch: Watch = lambda name, more: None) -> str:
    """Copies the artifact; -> the digest that names it there. Bytes that are there already are not sent again.

    Raises UserError without room, if the connection stays lost, or if files arrive damaged twice.
    """
    digest = artifact.digest[:SHORT]
    place.run(f"mkdir -p {place.path('incoming', digest)} {place.path('artifacts')}")
    if digest in place.digests():
        return digest
    sizes = {name: spec.size for name, spec in artifact.manifest.files.items()}
    sizes[MANIFEST] = (artifact.path / MANIFEST).stat().st_size
    _check_room(place, digest, sizes)
    for attempt in (1, 2):
        there = _sizes(place, digest)
        for name, size in sizes.items():
            _send(artifact, place, digest, name, size, there.get(name), watch)
        wrong = _damaged(artifact, place, digest)
        if not wrong:
            break
        if attempt == 2:
            raise UserError(
                f"expected {wrong[0]} with its sha256, found another one twice; check the disk of {place.shell.where}"
            )
        place.run("rm -f " + " ".join(place.path("incoming", digest, name) for name in wrong))
    source, target = place.path("incoming", digest), place.path("artifacts", digest)
    place.run(f"sync && mv -T {source} {target} && sync")
    return digest


def _check_room(place: RemoteFolder, digest: str, sizes: dict[str, int]) -> None:
    free = int(place.run(f"df --output=avail -B1 {place.path('incoming')} | tail -n 1"))
    there = int(place.run(f"du -sb --apparent-size {place.path('incoming', digest)} | cut -f1"))
    needed = sum(sizes.values()) - there + ROOM
    if free < needed:
        raise UserError(
            f"expected {needed:,} bytes of room in {place.folder} on {place.shell.where}, found {free:,}; make some"
        )


def _sizes(place: RemoteFolder, digest: str) -> dict[str, int]:
    """Bytes of each file that have arrived."""
    listing = place.run(f"cd {place.path('incoming', digest)} && find . -type f -printf '%s %P\\0'")
    return {name: int(size) for size, _, name in (entry.partition(" ") for entry in listing.split("\0") if entry)}


def _send(
    artifact: Artifact, place: RemoteFolder, digest: str, name: str, size: int, there: int | None, watch: Watch
) -> None:
    """Sends the missing bytes of one file; ``there``: bytes that have arrived, None if there is no file."""
    target = place.path("incoming", digest, name)
    folder = place.path("incoming", digest, str(PurePosixPath(name).parent))
    known = [there]

    def send_rest() -> None:
        found = known.pop() if known else _sizes(place, digest).get(name)
        if found is not None and found > size:
            place.shell.run(f"rm {target}")
            found = None
        done = found or 0

        def sent(more: int) -> None:
            nonlocal done
            done += more
            watch(name, done)

        watch(name, done)
        if found is None or done < size:
            place.shell.send(f"mkdir -p {folder} && cat >> {target}", artifact.path / name, done, sent)

    place.retry(send_rest)


def _damaged(artifact: Artifact, place: RemoteFolder, digest: str) -> list[str]:
    """Names of files whose sha256 there is not the manifest's."""
    wanted = {name: spec.sha256 for name, spec in artifact.manifest.files.items()}
    wanted[MANIFEST] = artifact.digest
    names = "".join(f"{name}\0" for name in wanted)
    sums = place.run(f"cd {place.path('incoming', digest)} && xargs -0 sha256sum --zero --", names)
    found = dict(_parse_sums(sums))
    return [name for name, expected in wanted.items() if found.get(name) != expected]


def _parse_sums(text: str) -> Iterator[tuple[str, str]]:
    for line in text.split("\0"):
        if line:
            yield line[66:], line[:64]  # the hash, a blank, a blank or an asterisk, the name


def try_out(place: RemoteFolder, digest: str, check: str) -> dict[str, Any]:
    """Runs the check on the artifact's folder; -> its report.

    Raises TrialFailed with the reasons for an exit code other than 0, and UserError without a report.
    """
    command = f"{check} {place.path('artifacts', digest)} --json"
    code, out, complaint = place.retry(lambda: place.shell.attempt(command))
    try:
        report: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(
            f"expected a report of {check} on {place.shell.where}, found: {complaint}; install rlrc there (rlrc jetson "
            "install), or name it by --check"
        ) from None
    if code:
        wrong = [f"{one['name']}: {one['found']}" for one in report.get("findings", []) if one["state"] == "fix"]
        raise TrialFailed("; ".join(wrong or report.get("failures", [])) or complaint)
    place.run(f"echo {digest} >> {place.path('verified')}")
    return report


def switch(place: RemoteFolder, digest: str) -> None:
    """Replaces the link by one rename: a reader sees the old artifact or the new one."""
    link, new = place.path("current"), place.path(".current.new")
    place.run(f"ln -sfnT artifacts/{digest} {new} && mv -T {new} {link} && sync")


def roll_back(place: RemoteFolder) -> str:
    """Makes the newest other verified artifact current; -> its digest. Raises UserError without one."""
    now = place.current()
    earlier = [digest for digest in place.verified() if digest != now]
    if not earlier:
        raise UserError(
            f"expected an earlier verified artifact in {place.folder} on {place.shell.where}, found none; deploy one"
        )
    switch(place, earlier[-1])
    return earlier[-1]


def clear(place: RemoteFolder, kept: int = KEPT) -> list[str]:
    """Removes all artifacts but the current one and the ``kept`` newest verified ones; -> the removed digests."""
    keep = {place.current(), *place.verified()[-kept:]}
    gone = sorted(place.digests() - keep)
    for digest in gone:
        place.run(f"rm -rf {place.path('artifacts', digest)}")
    return gone


def load(path: Any) -> Artifact:
    """Loads the artifact and checks every hash. Raises UserError if it changes in the meantime."""
    artifact = artifacts.load(path)
    if sha256(artifact.path / MANIFEST) != artifact.digest:
        raise UserError(f"expected {path} to be complete, found that it changes; wait until it is written")
    return artifact
