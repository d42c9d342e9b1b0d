"""The command install."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from tyro.conf import Positional

from rlrc.errors import UserError
from rlrc.jetson.board import install
from rlrc.jetson.board.remote import ConnectionLost, Shell
from rlrc.jetson.model import devices
from rlrc.runtime.board.monitor import is_jetson
from rlrc.runtime.cli.policy import fail_check
from rlrc.tables import plain_console

Stage = Literal["check", "packages", "user", "python", "onnxruntime", "llama", "service", "doctor"]
THERE = ".cache/rlrc-install"


@dataclass(frozen=True)
class Install:
    """Set up a Jetson: JetPack's packages, an environment, engines with CUDA, services. Can be repeated at any time.

    Runs on the board itself, or by ssh on another one; --write only writes the files, including a Dockerfile.
    """

    host: Positional[str | None] = None
    """the board, as ssh takes it: [user@]host (default: this machine)"""
    package: str | None = None
    """what pip installs there: a wheel, which is copied, or a requirement (default: this version of rlrc)"""
    stages: tuple[Stage, ...] = ()
    """run only these, in this order (default: all)"""
    write: Path | None = None
    """only write everything into this new folder, and print how to use it"""
    sudo: str = "sudo"
    """how to become root there; "env" if you are root already"""
    ssh: str = "ssh"
    """the program and its options, such as "ssh -p 2222 -i key" """

    def run(self) -> int:
        package = self.package or install.default_package()
        if self.write is not None:
            install.write(self.write, package)
            self._print_usage(self.write, package)
            return 0
        if self.host is None and not is_jetson():
            raise UserError("expected a Jetson, found another machine; name the board: rlrc jetson install user@host")
        with tempfile.TemporaryDirectory(prefix="rlrc-install-") as temporary:
            folder = Path(temporary, "files")
            install.write(folder, package)
            if self.host is None:
                return subprocess.call(["sh", "-c", f"{self.sudo} bash {quote(str(folder))}/install.sh {self._stages}"])
            return self.install_on(folder, Shell.ssh(self.host, self.ssh))

    def install_on(self, folder: Path, shell: Shell) -> int:
        """Sends the folder and runs its script in this terminal."""
        packed = folder.with_suffix(".tar")
        with tarfile.open(packed, "w") as archive:
            archive.add(folder, arcname=".")
        try:
            shell.run(f"rm -rf {THERE} && mkdir -p {THERE}")
            shell.send(f"tar -xC {THERE} -f -", packed, 0, lambda more: None)
            code = shell.live(f"{self.sudo} bash {THERE}/install.sh {self._stages}")
        except ConnectionLost as error:
            raise UserError(
                f"expected {shell.where} to answer, found: {error}; run the same command again; finished stages stay"
            ) from None
        return fail_check(f"install.sh on {shell.where} ended with code {code}") if code else 0

    @property
    def _stages(self) -> str:
        return " ".join(self.stages)

    def _print_usage(self, out: Path, package: str) -> None:
        console = plain_console()
        console.print(f"on the board: sudo bash {out}/install.sh")
        for name, sm in {
            (name, _sm(module)) for module in devices.table().devices.values() for name in module.jetpacks
        }:
            console.print(f"or in a container, JetPack {name}, SM {sm}: {install.docker(out, package, name, sm)}")


def _sm(module: devices.Module) -> int:
    return int(devices.table().architectures[module.architecture].sm.replace(".", ""))
