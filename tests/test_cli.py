"""The command line: one line and exit code 2 for what a user gets wrong, and no imports beyond the chosen command."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro

from rlrc.errors import UserError
from rlrc.runtime import cli


@dataclass(frozen=True)
class Fake:
    """A command that does what its fields say."""

    path: tyro.conf.Positional[Path]
    """where"""
    steps: int = 3
    """how many"""
    kind: Literal["a", "b"] = "a"
    """which"""
    act: Literal["succeed", "fail", "refuse", "interrupt", "import torch", "import bug"] = "succeed"
    """what to do"""

    def run(self) -> int | None:
        if self.act == "refuse":
            raise UserError("expected this,\n found that; do\tsomething")
        if self.act == "interrupt":
            raise KeyboardInterrupt
        if self.act.startswith("import"):
            name = {"torch": "torch.nn", "bug": "rlrc.nowhere"}[self.act.split()[1]]
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        print(self.path, self.steps, self.kind)
        return 1 if self.act == "fail" else None


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake_commands")
    module.Fake = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_commands", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_commands:Fake", "a fake"))
    monkeypatch.setitem(cli.COMMANDS, "bench fake", ("fake_commands:Fake", "a fake of two words"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must be refused; returns its one line on stderr."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rlrc: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err.removeprefix("rlrc: error: ").strip()


@pytest.mark.parametrize("name", ["fake", "bench fake"])
def test_a_command_runs(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main([*name.split(), "here", "--steps", "4"]) == 0
    assert capsys.readouterr().out == "here 4 a\n"


def test_a_failed_check_is_one() -> None:
    assert cli.main(["fake", "here", "--act", "fail"]) == 1


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "here", "--act", "interrupt"]) == 130
    assert capsys.readouterr().err == "rlrc: interrupted\n"


def test_an_error_of_the_user_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "fake", "here", "--act", "refuse") == "expected this, found that; do something"


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "fake", "here", "--act", "import torch")
    assert line == "expected the module torch, found none; run pip install 'rlrc[compress]'"


def test_a_bug_is_not_disguised() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"rlrc\.nowhere"):
        cli.main(["fake", "here", "--act", "import bug"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "found 'nonsense'; run rlrc --help"),
        (["fakee", "here"], "found 'fakee'; did you mean fake?"),
        (["bench"], None),  # prints the benchmarks
        (["bench", "fakes", "here"], "found 'bench fakes'; did you mean bench fake?"),
        (["fake"], "run rlrc fake --help"),
        (["fake", "here", "--bogus", "1"], "expected an option of rlrc fake, found --bogus; run rlrc fake --help"),
        (["fake", "here", "--step", "1"], "expected an option of rlrc fake, found --step; the nearest is --steps;"),
        (["fake", "--stpes=1"], "expected an option of rlrc fake, found --stpes; the nearest is --steps;"),
        (["bench", "fake", "--knid", "a", "here"], "found --knid; the nearest is --kind; run rlrc bench fake --help"),
        (["fake", "here", "--steps", "many"], "Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        (["fake", "here", "--kind", "c"], "invalid choice 'c' for argument '--kind'. Expected one of ('a', 'b')"),
        (["fake", "here", "there"], "Unrecognized options: there"),
        (["fake", "here", "--steps"], "Missing value for argument '--steps'"),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str | None
) -> None:
    if expected is None:
        assert cli.main(arguments) == 0
        assert "bench fake" in capsys.readouterr().out
    else:
        assert expected in refusal(capsys, *arguments)


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "fake", "--help"])
    assert not exit_.value.code
    captured = capsys.readouterr()
    assert "usage: rlrc bench fake" in captured.out
    assert "how many" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["bench", "--help"], ["nonsense"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from rlrc.runtime import cli; cli.main(sys.argv[1:])\n"
        "print(sorted({'numpy', 'onnx', 'onnxruntime', 'torch', 'transformers', 'tyro'} & set(sys.modules)), 'loaded')"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[] loaded"


def test_every_command_exists_and_has_help() -> None:
    for target, text in cli.COMMANDS.values():
        module, attribute = target.split(":")
        assert hasattr(importlib.import_module(module), attribute), target
        assert text


def test_the_installed_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("rlrc")
    ended = subprocess.run([command, "inspect", tmp_path / "no"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("rlrc: error: expected an artifact folder at")


@pytest.mark.parametrize("arguments", [["sft", "--help"], ["jetson", "devices"], ["jetson", "calibration"], ["--help"]])
def test_a_reader_that_goes_is_no_error(arguments: list[str]) -> None:
    """What `rlrc ... | head` does, with a reader that takes nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "import sys; from rlrc.runtime.cli import main; sys.exit(main())", *arguments]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode == 128 + signal.SIGPIPE


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out")

    monkeypatch.setattr("rlrc.runtime.cli.parse", full)
    assert cli.main(["inspect", "somewhere"]) == 2
    line = "expected to write out, found: No space left on device; free space there, and run the same command again"
    assert capsys.readouterr().err.strip() == f"rlrc: error: {line}"
