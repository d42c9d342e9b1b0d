"""A stage that a signal interrupts: it saves its last step, ends at once, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from subprocesses import environment

from rlrc import artifact as artifacts
from rlrc import interrupts
from rlrc.compressor.cli.compress import compress
from rlrc.compressor.stages.artifact_io import open_tensors
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training.sft import make_interruptible
from rlrc.errors import Interrupted

AT_ONCE = 5.0  # seconds: two on a machine of its own, but tests share theirs

# The command, with a policy whose backward passes take seconds where SLOW is set: a layer takes a tenth of one.
SCRIPT = """
import os, sys, time
from torch import nn

from rlrc.compressor.training import sft
from rlrc.runtime.cli import main

if os.environ.get("SLOW"):
    real = sft.SFTObjective.forward

    def slow(self, batch):
        for parameter in self.parameters():
            if not hasattr(parameter, "delayed"):
                parameter.delayed = True
                parameter.register_hook(lambda gradient: time.sleep(0.1))
        return real(self, batch)

    sft.SFTObjective.forward = slow
if __name__ == "__main__":
    sys.exit(main())
"""


# A command that a signal interrupts, in a process with a handler, a thread, and a module that takes long to destroy.
ENDING = """
import atexit, signal, sys, threading, time

from rlrc.runtime import cli

class Command:
    def run(self):
        atexit.register(print, "handler")
        threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
        signal.raise_signal(signal.Signals[sys.argv[2]])

class Slow:
    def __del__(self, print=print):
        print("destroyed")

slow = Slow()
cli.parse = lambda name, rest: Command()
sys.exit(cli.main())
"""


@pytest.fixture
def script(tmp_path: Path, own_cache: Path, demos: object) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def started(script: Path, *arguments: object, slow: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), *map(str, arguments), "--evaluate", "0", "--threads", "1", "--workers", "1"]
    given = environment(SLOW="1" if slow else "")
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], within: float = 120) -> tuple[int, str]:
    """-> exit code and the lines on stderr that are no progress."""
    errors = process.communicate(timeout=within)[1]
    lines = [line for line in errors.splitlines() if line.startswith("rlrc") or "Error" in line]
    return process.returncode, "\n".join(lines)


def wait_for(process: subprocess.Popen[str], out: Path, file: str) -> None:
    """Until it is in the run's folder: the curve comes with step 50."""
    deadline = time.monotonic() + 120
    while not (out.parent / f".{out.name}.run" / file).exists():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return dict(open_tensors(artifacts.load(out)))


def curve(out: Path) -> list[dict[str, float]]:
    (file,) = (out / "curves").iterdir()
    return [{k: v for k, v in json.loads(row).items() if k != "cpu_seconds"} for row in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("stage", "number"), [("sft", signal.SIGINT), pytest.param("distill", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_command_goes_on_and_ends_with_the_same_weights(
    script: Path, pupil_artifact: Path, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    arguments = ["--steps", "150", "--batch", "32", "--demonstrations", "1"]
    if stage == "distill":
        arguments += ["--teacher", str(pupil_artifact)]
    process = started(script, stage, pupil_artifact, tmp_path / "whole", *arguments)
    assert ended(process) == (0, "")
    process = started(script, stage, pupil_artifact, tmp_path / "cut", *arguments)
    wait_for(process, tmp_path / "cut", "curve.jsonl")
    process.send_signal(number)
    code, errors = ended(process, AT_ONCE)
    assert code == 128 + number, errors
    found = re.search(rf"^rlrc: interrupted; the same command resumes at step (\d+) of {stage}$", errors, re.MULTILINE)
    assert found, errors
    assert not (tmp_path / "cut").exists()
    assert torch.load(tmp_path / ".cut.run" / "state.pt", weights_only=True)["step"] == int(found[1]) >= 50
    process = started(script, stage, pupil_artifact, tmp_path / "cut", *arguments)
    assert ended(process) == (0, "")
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert not (tmp_path / ".cut.run").exists()


@pytest.mark.slow
def test_a_signal_in_a_long_backward_pass_ends_it_between_two_layers(
    script: Path, pupil_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--steps", "9", "--batch", "4", "--demonstrations", "1"]
    process = started(script, "sft", pupil_artifact, out, *arguments, slow=True)
    wait_for(process, out, "stage.json")
    time.sleep(4)
    process.terminate()
    code, errors = ended(process, AT_ONCE)
    assert code == 143
    assert re.search(r"resumes at step \d of sft|starts it again", errors), errors


def test_a_signal_is_held_where_a_state_would_be_half_changed() -> None:
    done = []
    with interrupts.raise_on_signal():
        with pytest.raises(Interrupted) as caught, interrupts.hold(), interrupts.hold():
            signal.raise_signal(signal.SIGTERM)
            done.append(interrupts.pending())
        assert caught.value.code == 143
        assert not interrupts.pending()
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert done == [True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_hooks_let_a_signal_into_a_backward_pass() -> None:
    """The signal comes while the second layer's gradient is computed; the first layer's is not any more."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    make_interruptible(layers.parameters())
    layers[1].weight.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))
    with interrupts.raise_on_signal(), pytest.raises(Interrupted):
        layers(torch.ones(1, 4)).sum().backward()
    assert layers[0].weight.grad is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_no_stage_leaves_nothing_either(
    tiny_artifact: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "rlrc.runtime.cli", "export", str(tiny_artifact), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    assert ended(process, 60) == (128 + number, "rlrc: interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_ends_before_its_modules_are_destroyed(number: signal.Signals) -> None:
    """That alone takes torch a second or more. Threads end and handlers run all the same."""
    command = [sys.executable, "-c", ENDING, "new", number.name]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "thread\nhandler\n", "rlrc: interrupted\n")


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.raise_on_signal():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupted_compression_says_what_goes_on(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object) -> None:
        raise Interrupted(code=143)

    monkeypatch.setattr("rlrc.exporters.export.export", interrupted)
    with pytest.raises(Interrupted, match=r"^the same command continues with the export$") as caught:
        compress(tiny_artifact, tmp_path / "out", {}, StageOptions(evaluate=0))
    assert caught.value.code == 143
