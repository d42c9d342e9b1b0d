"""Writes a folder that sets up a board: the script, settings of each JetPack, services, a Dockerfile.

The same folder works on every board of the table of devices: the script reads the release of Jetson Linux there.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from shlex import quote

from rlrc.errors import UserError
from rlrc.folders import create_folder
from rlrc.jetson.model import devices
from rlrc.jetson.model.devices import JetPack

FILES = Path(__file__).with_name("device")
STAGES = ("check", "packages", "user", "python", "onnxruntime", "llama", "service", "doctor")


def write(out: Path, package: str) -> None:
    """Writes the folder. ``package``: a wheel or a requirement for pip. Raises UserError for a missing wheel."""
    wheel = Path(package) if package.endswith(".whl") else None
    if wheel is not None and not wheel.is_file():
        raise UserError(f"expected a wheel, found no file {wheel}; make one: pip wheel --no-deps -w DIR .")
    with create_folder(out) as folder:
        for file in sorted(FILES.iterdir()):
            shutil.copy2(file, folder / file.name)
        (folder / "packages").mkdir()
        (folder / "packages/README").write_text("Wheels that the Dockerfile and install.sh are to install.\n")
        if wheel is not None:
            shutil.copy2(wheel, folder / "packages" / wheel.name)
        (folder / "package.env").write_text(f"PACKAGE={quote(requirement(wheel, package))}\n")
        for name, jetpack in devices.table().jetpacks.items():
            (folder / f"{jetpack.linux.partition('.')[0]}.env").write_text(settings(name, jetpack))


def requirement(wheel: Path | None, package: str) -> str:
    return package if wheel is None else f"packages/{wheel.name}"


def settings(name: str, jetpack: JetPack) -> str:
    """Variables for install.sh."""
    values = {
        "JETPACK": name,
        "UBUNTU": jetpack.ubuntu,
        "PYTHON": jetpack.python,
        "CUDA": jetpack.cuda,
        "WHEELS": jetpack.wheels,
    }
    return "".join(f"{key}={quote(value)}\n" for key, value in values.items())


def docker(out: Path, package: str, name: str, sm: int) -> str:
    """The command that builds the container on a board with the JetPack."""
    jetpack = devices.table().jetpacks[name]
    wheel = Path(package).name if package.endswith(".whl") else package
    values = {"IMAGE": jetpack.image, "WHEELS": jetpack.wheels, "SM": str(sm), "PACKAGE": wheel}
    arguments = " ".join(f"--build-arg {key}={quote(value)}" for key, value in values.items())
    return f"docker build -t rlrc:jetpack-{name} {arguments} {quote(str(out))}"


def default_package() -> str:
    return f"rlrc=={version('rlrc')}"
