"""What products are computed in: measured on this processor, or as asked for; recorded, and kept by a resumed run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from subprocesses import environment

from rlrc import artifact as artifacts
from rlrc.artifact import HistoryEntry
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.compress import check_same
from rlrc.compressor.models import precision
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.stages import prune
from rlrc.compressor.stages.sources import open_source
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.run_state import RunState
from rlrc.errors import UserError

# Without bfloat16 instructions: AVX2, and AVX-512 where oneDNN says that it supports bfloat16 and emulates it.
SLOW = [
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
]
MEASURED = """
import json, time, torch
from rlrc.compressor.models import precision

torch.set_num_threads(1)
began = time.perf_counter()
with precision.autocast("cpu"):
    product = torch.ones(4, 8) @ torch.ones(8, 4)
print(json.dumps([str(product.dtype), precision.pick_for_inference(), time.perf_counter() - began]))
"""


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """The choice of this process, as the tests found it."""
    before = precision.current()
    yield
    precision.use(before)


def run_python(code: str, **more: str) -> Any:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("environment", SLOW, ids=["avx2", "avx512"])
def test_without_bfloat16_instructions_products_are_float32(environment: dict[str, str]) -> None:
    assert run_python(MEASURED, **environment)[:2] == ["torch.float32", "float32"]


def test_the_quicker_type_is_chosen_by_a_tenth_at_least() -> None:
    """Products whose times are made up: a clock that each moves on."""

    def chosen(float32: float, bfloat16: float) -> tuple[str, int]:
        clock, calls = [0.0], []

        def product(dtype: torch.dtype) -> None:
            calls.append(dtype)
            clock[0] += float32 if dtype is torch.float32 else bfloat16

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(precision, "thread_time", lambda: clock[0])
            return precision._pick([product, product]), len(calls)

    assert chosen(1.0, 0.5) == ("bfloat16", 4 * precision.ROUNDS)
    assert chosen(1.0, 0.95) == ("float32", 4 * precision.ROUNDS)
    assert chosen(1.0, 1.2) == ("float32", 4 * precision.ROUNDS)
    assert chosen(1.0, 100.0) == ("float32", 8)  # no more rounds than tell


def test_what_is_asked_for_is_what_products_are_computed_in() -> None:
    for wanted, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        precision.use(precision.choose(wanted, "cpu"))  # type: ignore[arg-type]
        with precision.autocast("cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    with pytest.raises(UserError, match="expected --precision auto, float32, bfloat16, found 'float16'"):
        StageOptions(precision="float16")  # type: ignore[arg-type]


def test_the_history_says_what_products_were_computed_in(tiny_artifact: Path, tmp_path: Path) -> None:
    for wanted in ("float32", "bfloat16", "auto"):
        options = StageOptions(evaluate=0, workers=1, threads=1, precision=wanted)
        prune.run_prune(tiny_artifact, tmp_path / wanted, PruneConfig(0.5, "magnitude"), options)
        entry = artifacts.load(tmp_path / wanted).manifest.history[-1]
        assert entry.precision["cpu"] == (precision.pick_for_training("cpu") if wanted == "auto" else wanted)


def test_a_run_that_goes_on_keeps_its_precision(tmp_path: Path) -> None:
    begun = RunState(tmp_path / "run")
    begun.open("sft", "parent", SFTConfig(), "float32")
    begun.save(3)
    precision.use({"cpu": "bfloat16"})
    for wanted in ("auto", "float32"):
        RunState(tmp_path / "run").open("sft", "parent", SFTConfig(), wanted)
        assert precision.current()["cpu"] == "float32"
    with pytest.raises(UserError, match=r"expected --precision float32, which the run in .*run began with, found bf"):
        RunState(tmp_path / "run").open("sft", "parent", SFTConfig(), "bfloat16")


def test_finished_stages_of_another_precision_are_refused_where_one_is_asked_for(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    config = PruneConfig(0.5, "magnitude")
    options = StageOptions(evaluate=0, workers=1, threads=1, precision="float32")
    prune.run_prune(tiny_artifact, tmp_path / "prune", config, options)
    source = open_source(tiny_artifact, Flags())
    check_same(tmp_path / "prune", "prune", source, config, "auto")
    check_same(tmp_path / "prune", "prune", source, config, "float32")
    with pytest.raises(UserError, match="to be stage prune of this recipe and input"):
        check_same(tmp_path / "prune", "prune", source, config, "bfloat16")


def test_artifacts_of_before_have_no_precision() -> None:
    assert HistoryEntry("sft", {}, "0.1.0", None, 0.0).precision == {}


def test_no_module_names_a_type_for_speed() -> None:
    """autocast is called in one place only: whoever needs it asks there."""
    root = Path(__file__).parents[1]
    files = [file for part in ("compressor", "benchmarks/rlrc", "exporters") for file in (root / part).rglob("*.py")]
    assert [file.name for file in files if "torch.autocast(" in file.read_text()] == ["precision.py"]
