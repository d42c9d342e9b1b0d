"""Tables of the command line: nothing of them is cut, without a terminal and in narrow ones."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from rlrc.runtime import cli
from rlrc.tables import print_rows, print_table

NAMES = ["observation.images.a_camera_with_a_long_name", "left_shoulder_pan.pos", "the gripper of the left arm"]
NUMBERS = ["-1234.5678", "0.000123456", "1.234e-05", "98765.4321"]


def table() -> Table:
    found = Table("feature", "type", *(f"figure {i}" for i in range(8)), title="what is in it")
    for name in NAMES:
        found.add_row(name, "float32", *NUMBERS, *NUMBERS)
    return found


def printed(width: int, terminal: bool, make: Callable[[], Table] = table) -> str:
    file = io.StringIO()
    print_table(make(), Console(file=file, width=width, force_terminal=terminal, color_system=None))
    return file.getvalue()


@pytest.mark.parametrize("width", [20, 80])
def test_without_a_terminal_a_table_is_as_wide_as_it_needs(width: int) -> None:
    lines = printed(width, terminal=False).splitlines()
    for name in NAMES:
        (line,) = [line for line in lines if name in line]
        assert [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] == [name, "float32", *NUMBERS, *NUMBERS]


@pytest.mark.parametrize("width", [30, 80, 120, 400])
def test_in_a_terminal_no_number_is_cut_or_folded(width: int) -> None:
    text = printed(width, terminal=True)
    assert "…" not in text
    for number in NUMBERS:
        assert text.count(number) == 2 * len(NAMES)
    assert all(word in text for word in ("gripper", "left_shoulder_pan.pos", "feature", "figure"))
    joined = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert NAMES[0] in joined


def test_rows_are_not_cut() -> None:
    file = io.StringIO()
    path = "/" + "a_long_folder/" * 20
    print_rows({"artifact": path, "history": "word " * 60}, Console(file=file, width=80))
    assert path in file.getvalue()
    assert file.getvalue().count("word") == 60


def test_commands_cut_nothing_without_a_terminal(
    toy_artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    for arguments in (["inspect", toy_artifact], ["jetson", "plan", toy_artifact, "--device", "orin-nano-8gb"]):
        cli.main([str(argument) for argument in arguments])
        out = capsys.readouterr().out
        assert out
        assert "…" not in out
