"""What a stage will need, and that it is refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.quantize.quantize import QuantizeConfig
from rlrc.compressor.stages import prune, quantize, sft
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import memory
from rlrc.compressor.training.config import SFTConfig
from rlrc.errors import UserError

QUIET = StageOptions(evaluate=0, workers=1, threads=1)


def test_predictions_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A billion parameters in float32: 4 GB of weights, 4 of gradients, 8 of moments, and the reserve."""
    tensors = {"a": torch.empty(1000, 999_000, device="meta"), "b": torch.empty(1_000_000, device="meta")}
    assert memory.count_numbers(tensors) == 10**9
    monkeypatch.setattr(memory, "available", lambda: 16_000_000_000)
    with pytest.raises(UserError, match=r"expected 16\.5 GB of free memory for training of all weights .*found 16\.0"):
        memory.check_training(tensors, adapters=False)
    memory.check_training(tensors, adapters=True)
    with pytest.raises(UserError, match=r"expected 20\.5 GB of free memory for training \(?.*") as error:
        memory.check_training(tensors, adapters=False, copies=2)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"expected 22\.5 GB of free memory"):  # and a teacher of 1.5 billion
        memory.check_training(tensors, adapters=False, teacher=1_500_000_000)
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.check_training(tensors, adapters=False)


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
    monkeypatch.setattr(memory, "available", lambda: 100_000_000)
    stages: list[tuple[Any, Any, str]] = [
        (prune.run_prune, PruneConfig(score="magnitude"), "pruning"),
        (quantize.run_quantize, QuantizeConfig(), "quantizing"),
        (sft.run_sft, SFTConfig(), "training"),
    ]
    for run, config, work in stages:
        with pytest.raises(UserError, match=rf"expected 0\.5 GB of free memory for {work}.* found 0\.1 GB"):
            run(pupil_artifact, tmp_path / "out", config, QUIET)
    assert list(tmp_path.iterdir()) == []
