"""The commands deploy and rollback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from rlrc.benchmarks.results.results import check_out, dump, write
from rlrc.errors import UserError
from rlrc.jetson.board import deploy
from rlrc.jetson.board.deploy import FOLDER, KEPT, RemoteFolder, TrialFailed, Watch
from rlrc.jetson.board.remote import Shell
from rlrc.progress import progress
from rlrc.runtime.cli.policy import fail_check
from rlrc.tables import plain_console

CHECK = "/opt/rlrc/venv/bin/rlrc jetson doctor"


@dataclass(frozen=True)
class Deploy:
    """Copy an artifact to a robot's computer, try it there, and make it current; exit code 1 if it does not work there.

    An interrupted copy continues where it stopped. The current artifact stays until the new one is complete and tried.
    """

    path: Positional[Path]
    """the artifact"""
    host: Positional[str]
    """the other machine, as ssh takes it: [user@]host"""
    folder: str = FOLDER
    """where artifacts lie there; FOLDER/current is the one in use"""
    check: str = CHECK
    """command that tries an artifact there; the folder and --json are appended"""
    unchecked: bool = False
    """make it current without trying it"""
    after: str | None = None
    """command to run there afterwards, such as "sudo systemctl restart rlrc-run@arm"; if it fails, the former artifact
    becomes current again and the command runs once more"""
    keep: int = KEPT
    """verified artifacts to keep there for a rollback"""
    ssh: str = "ssh"
    """the program and its options, such as "ssh -p 2222 -i key" """
    out: Path | None = None
    """file for the report of the trial, as JSON; rlrc report reads it"""
    force: bool = False
    """replace that file"""
    json: bool = False
    """print the former, the current and the removed artifacts as JSON"""

    def run(self) -> int:
        if self.keep < 1:
            raise UserError(f"expected to keep at least one artifact, found --keep {self.keep}; give 1 or more")
        check_out(self.out, self.force)
        artifact = deploy.load(self.path)
        return self.carry_out(artifact, RemoteFolder(Shell.ssh(self.host, self.ssh), self.folder))

    def carry_out(self, artifact: Any, place: RemoteFolder) -> int:
        console, before = plain_console(stderr=self.json), place.current()
        with _progress(artifact) as watch:
            digest = deploy.copy(artifact, place, watch)
        console.print(f"{place.shell.where}: {place.folder}/artifacts/{digest} is complete")
        if not self.unchecked:
            try:
                report = deploy.try_out(place, digest, self.check)
            except TrialFailed as error:
                return fail_check(f"{error}; {place.folder}/current is still {before or 'none'}")
            if self.out is not None:
                write(self.out, dump(report))
        deploy.switch(place, digest)
        if self.after is not None and (failure := self._after(place)) is not None:
            if before is None:
                return fail_check(f"{self.after} failed: {failure}; there is no former artifact")
            deploy.switch(place, before)
            self._after(place)
            return fail_check(f"{self.after} failed: {failure}; back to {before}")
        gone = deploy.clear(place, self.keep)
        if self.json:
            print(json.dumps({"before": before, "current": digest, "removed": gone}))
        removed = f"; removed {', '.join(gone)}" if gone else ""
        console.print(f"{place.folder}/current is {digest}{removed}")
        return 0

    def _after(self, place: RemoteFolder) -> str | None:
        assert self.after is not None
        code, _, complaint = place.retry(lambda: place.shell.attempt(str(self.after)))
        return complaint if code else None


@dataclass(frozen=True)
class Rollback:
    """Make the newest other verified artifact current."""

    host: Positional[str]
    """the other machine, as ssh takes it: [user@]host"""
    folder: str = FOLDER
    """where artifacts lie there"""
    after: str | None = None
    """command to run there afterwards, such as "sudo systemctl restart rlrc-run@arm" """
    ssh: str = "ssh"
    """the program and its options, such as "ssh -p 2222 -i key" """
    json: bool = False
    """print the former and the current artifact as JSON"""

    def run(self) -> int:
        return self.carry_out(RemoteFolder(Shell.ssh(self.host, self.ssh), self.folder))

    def carry_out(self, place: RemoteFolder) -> int:
        before = place.current()
        digest = deploy.roll_back(place)
        if self.json:
            print(json.dumps({"before": before, "current": digest}))
        else:
            plain_console().print(f"{place.folder}/current is {digest}, was {before or 'none'}")
        if self.after is not None:
            code, _, complaint = place.retry(lambda: place.shell.attempt(str(self.after)))
            if code:
                return fail_check(f"{self.after} failed: {complaint}")
        return 0


@contextmanager
def _progress(artifact: Any) -> Iterator[Watch]:
    total = sum(spec.size for spec in artifact.manifest.files.values())
    with progress("copying, MB", round(total / 1e6, 1)) as report:
        there: dict[str, int] = {}

        def watch(name: str, size: int) -> None:
            there[name] = size
            report(round(sum(there.values()) / 1e6, 1), name)

        yield watch
