"""Run pip as if under another Python on another machine, for wheels only.

    python scripts/pip_as.py 3.10.12 aarch64 install --dry-run 'numpy>=2; python_version < "3.11"'

pip's options select wheels for another Python, but pip evaluates environment markers for the running Python. This
script replaces the marker environment as well.
"""

from __future__ import annotations

import runpy
import sys

from pip._vendor.packaging import markers

GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)  # up to 2.35 of Ubuntu 22.04 (JetPack 6)


def main(version: str, machine: str, *arguments: str) -> None:
    release = ".".join(version.split(".")[:2])
    environment = {
        **markers.default_environment(),
        "implementation_version": version,
        "platform_machine": machine,
        "platform_release": "",
        "platform_version": "",
        "python_full_version": version,
        "python_version": release,
    }
    markers.default_environment = lambda: dict(environment)
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)] + [f"manylinux2014_{machine}"]
    command, *rest = arguments
    sys.argv = [
        "pip",
        command,
        "--only-binary=:all:",
        f"--python-version={version}",
        "--implementation=cp",
        f"--abi=cp{release.replace('.', '')}",
        *(f"--platform={platform}" for platform in platforms),
        *rest,
    ]
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(f"expected a Python version, a machine and pip's arguments, found {sys.argv[1:]}; pass all three")
    main(*sys.argv[1:])
