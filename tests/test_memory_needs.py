"""What a stage will need, and that it is refused before anything is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from subprocesses import environment

from families import DATA, flags
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.nn import linear
from rlrc.compressor.models.peak import PeakMemory
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.stages import memory, prune, quantize, sft
from rlrc.compressor.stages.sources import PolicySource, open_source, shapes
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training.config import SFTConfig
from rlrc.errors import UserError

QUIET = StageOptions(evaluate=0, workers=1, threads=1)


def test_the_peak_is_that_of_tensors_that_exist_together() -> None:
    """Of 400 bytes each, on the meta device: two at a time; views and what is given take nothing."""
    given = torch.empty(10, 10, device="meta")
    with PeakMemory([given]) as measured:
        a = given * 2 + 1
        b = a.view(100) * 2
        assert measured.live == 800
        del a
        b.mul_(3)
        b = b.reshape(10, 10) + 1
        assert measured.live == 400
    assert measured.peak == 800


def test_a_backward_pass_holds_what_it_reads_again() -> None:
    """tanh keeps its result (48 bytes), the sum nothing; then there are two numbers and the gradient (48)."""
    x = torch.empty(3, 4, device="meta", requires_grad=True)
    with PeakMemory([x]) as measured:
        loss = x.tanh().sum()
        assert measured.live == 48 + 4
        loss.backward()
    assert x.grad is not None
    assert measured.peak == 48 + 4 + 4 + 48


@pytest.fixture
def source(pupil_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> PolicySource:
    """The largest matrices of its decoder are 128 x 128; no pass takes anything."""
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "_infer", lambda *_: 0)
    monkeypatch.setattr(memory, "_backward", lambda *_: 1000)
    return open_source(pupil_artifact, Flags())


def test_what_stages_hold(source: PolicySource, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [tensor for name, tensor in shapes(source).items() if name.startswith("decoder.layers")]
    matrices = [tensor for tensor in blocks if tensor.ndim == 2]
    largest, numbers = max(tensor.numel() for tensor in matrices), memory.count_numbers(shapes(source))
    assert memory.of_prune(source, PruneConfig(score="magnitude")).in_memory() == memory.LATER + 10 * largest
    assert memory.of_prune(source, PruneConfig(lossless=True)).passing == 0
    assert memory.of_quantize(source, QuantizeConfig()).passing == 30 * largest
    monkeypatch.setattr(linear, "PART", 512)  # numbers are rounded at a time
    assert memory.of_quantize(source, QuantizeConfig()).passing == 30 * 512
    inputs = max(tensor.shape[1] for tensor in matrices)
    gptq = memory.of_quantize(source, QuantizeConfig(method="gptq"))
    assert gptq.passing == 8 * inputs**2 + 12 * memory.ROWS * inputs
    # Two moments of four bytes; what is trained as float32; a copy of the best weights.
    trained = sum(parameter.numel() for parameter in build_on_meta(source.spec, source.towers).parameters())
    whole = memory.of_training(source, SFTConfig())
    assert (whole.weights, whole.held, whole.passing) == (0, 12 * trained, 1000)
    assert memory.of_training(source, SFTConfig(held_out=0.1)).held == 16 * trained
    adapters = memory.of_training(source, SFTConfig(lora=2))
    assert adapters.held == 12 * sum(2 * sum(tensor.shape) for tensor in matrices)
    assert 2 * numbers <= adapters.weights < 4 * numbers
    assert adapters.on_accelerator() == adapters.weights + adapters.held + 1000
    taught = memory.of_training(source, SFTConfig(lora=2), source)
    assert (taught.weights, taught.held) == (2 * adapters.weights, adapters.held)


@pytest.mark.parametrize("family", ["pi05", "openvla", "act"])
def test_every_score_of_a_lossless_artifact_is_predicted(family: str, tmp_path: Path) -> None:
    """pi0.5's expert then has tables of norms, which are no layers."""
    checkpoint, given = DATA / family / "checkpoint", flags(family)
    prune.run_prune(checkpoint, tmp_path / "out", PruneConfig(lossless=True), QUIET, given)
    source = open_source(tmp_path / "out", Flags())
    for tower in source.towers.keys() & {"decoder", "expert", "encoder"}:
        for score in ("taylor", "wanda", "magnitude"):
            config = PruneConfig(score=score, tower=tower, batch=2)  # type: ignore[arg-type]
            assert memory.of_prune(source, config).passing > 0


def test_checkpointing_and_smaller_parts_of_a_batch_take_less(pupil_artifact: Path) -> None:
    source = open_source(pupil_artifact, Flags())

    def need(**settings: Any) -> int:
        return memory.of_training(source, SFTConfig(batch=8, lora=2, **settings)).passing

    assert need(checkpointing=True) < 0.7 * need()
    assert need(accumulate=4) < 0.4 * need()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_tensors_return_to_the_system() -> None:
    """190 MB are kept between tensors that are freed: the heap alone would hold 500 MB."""
    program = """
import sys, torch
from rlrc.compressor.models import heap
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1e3
if sys.argv[1:]:
    heap.return_large()
before, kept = anonymous(), []
for _ in range(40):
    passing = [torch.ones(290, 11008) for _ in range(3)]
    kept.append(torch.ones(290, 4096))
    del passing
print(anonymous() - before)
"""

    def held(*arguments: str) -> float:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
        return float(done.stdout)

    assert held("return") < 220 < held()


def test_free_memory_is_the_least_of_what_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "CGROUP", group)
    assert memory.available() is None
    meminfo.write_text("MemTotal:       1000 kB\nMemAvailable:    800 kB\n")
    assert memory.available() == 800 * 1024
    group.mkdir()
    (group / "memory.current").write_text("500000\n")
    (group / "memory.stat").write_text("anon 400000\ninactive_file 100000\n")
    (group / "memory.max").write_text("max\n")
    assert memory.available() == 800 * 1024
    (group / "memory.max").write_text("600000\n")
    assert memory.available() == 200_000


def test_stages_are_refused_before_they_start(
    pupil_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "available", lambda: 80_000_000)
    stages: list[tuple[Any, Any, str]] = [
        (prune.run_prune, PruneConfig(score="magnitude"), "pruning, found 0.1 GB; close other programs or use"),
        (quantize.run_quantize, QuantizeConfig(), "quantizing, found 0.1 GB; close other programs or use"),
        (sft.run_sft, SFTConfig(), "training, found 0.1 GB; train adapters .--lora 16., give --checkpointing, divide"),
        (sft.run_sft, SFTConfig(lora=2, checkpointing=True), "training, found 0.1 GB; divide the batch"),
    ]
    for run, config, line in stages:
        with pytest.raises(UserError, match=rf"expected 0\.[12] GB of free memory for {line}") as error:
            run(pupil_artifact, tmp_path / "out", config, QUIET)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_large_stages_say_what_they_need(
    pupil_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PruneConfig(score="magnitude", ratio=0.5)
    prune.run_prune(pupil_artifact, tmp_path / "small", config, QUIET)
    assert "needs about" not in capsys.readouterr().err
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "STATUS", Path("nowhere"))
    prune.run_prune(pupil_artifact, tmp_path / "out", config, QUIET)
    assert "pruning needs about 0.33 GB of memory" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_the_process_has_taken_is_measured() -> None:
    before = memory.taken()
    kept = torch.ones(25_000_000)
    assert memory.taken() - before == pytest.approx(kept.nbytes, rel=0.1)
