"""pip as it would run under another Python on another machine, for wheels only.

    python scripts/pip_as.py 3.10.12 aarch64 install --dry-run 'numpy>=2; python_version < "3.11"'

pip's own options choose wheels for another Python, but it still evaluates markers for the Python that runs it: here
they are evaluated for the other one too.
"""

from __future__ import annotations

import runpy
import sys

from pip._vendor.packaging import markers

GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)  # Ubuntu 22.04, which JetPack 6 is, has 2.35


def main(version: str, machine: str, *arguments: str) -> None:
    release = ".".join(version.split(".")[:2])
    ours = markers.default_environment()
    other = {
        **ours,
        "implementation_version": version,
        "platform_machine": machine,
        "platform_release": "",
        "platform_version": "",
        "python_full_version": version,
        "python_version": release,
    }
    markers.default_environment = lambda: dict(other)
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
        sys.exit(f"expected a version of Python, a machine and pip's arguments, found {sys.argv[1:]}")
    main(*sys.argv[1:])
