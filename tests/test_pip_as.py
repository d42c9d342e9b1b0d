"""pip for another Python: markers are those of that one, not of the interpreter that runs pip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pip")

SCRIPT = Path(__file__).parents[1] / "scripts/pip_as.py"


@pytest.mark.parametrize(
    ("version", "machine", "marker", "wanted"),
    [
        ("3.10.12", "aarch64", 'python_version < "3.11"', True),
        ("3.12.3", "aarch64", 'python_version < "3.11"', False),
        ("3.12.3", "aarch64", 'python_full_version >= "3.12.3"', True),
        ("3.11.2", "aarch64", 'platform_machine == "aarch64"', True),
        ("3.11.2", "x86_64", 'platform_machine == "aarch64"', False),
    ],
)
def test_markers_are_evaluated_for_the_other_python(
    version: str, machine: str, marker: str, wanted: bool, tmp_path: Path
) -> None:
    """What is wanted is not found without an index; what is not wanted need not be."""
    command = [sys.executable, str(SCRIPT), version, machine, "install", "--dry-run", "--no-index", "--target"]
    done = subprocess.run(
        [*command, str(tmp_path), f"a-package-of-no-index; {marker}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == wanted, done.stderr
    assert ("No matching distribution found for a-package-of-no-index" in done.stderr) == wanted
