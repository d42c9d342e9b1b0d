"""Bytes that count, and the memory of a process that holds a known amount."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import FileSpec, Manifest, QuantizationSpec
from rlrc.benchmarks.measure import memory
from rlrc.benchmarks.results import results
from rlrc.runtime.cli import main

VISION, DECODER = "graphs/onnx/vision.onnx", "graphs/onnx/decoder.onnx"


@pytest.fixture
def exported(toy_artifact: Path) -> Callable[..., Manifest]:
    """A manifest with files of the given sizes and two graphs."""
    manifest = artifacts.load(toy_artifact).manifest

    def make(files: dict[str, int], **changes: Any) -> Manifest:
        return replace(manifest, files={name: FileSpec("0" * 64, size) for name, size in files.items()}, **changes)

    return make


def test_everything_the_runtime_loads_counts_and_nothing_else(exported: Callable[..., Manifest]) -> None:
    files = {
        VISION: 100, DECODER: 1000, f"{DECODER}.data": 7000, results.TOKENIZER: 10,
        "weights/model.safetensors": 5000, "golden.npz": 900, "graphs/gguf/policy.gguf": 4000,
    }  # fmt: skip
    counted = results.sizes(exported(files, parameters=1_000_000))
    assert counted == {
        "bytes": 8110,
        "file_bytes": 8100,
        "tokenizer_bytes": 10,
        "counting": "graph files + tokenizer",
    }


def test_dense_counts_as_bf16_when_its_graphs_are_fp32(exported: Callable[..., Manifest]) -> None:
    counted = results.sizes(exported({VISION: 400, DECODER: 3600, results.TOKENIZER: 10}, parameters=1000))
    assert counted["bytes"] == 2 * 1000 + 10
    assert counted["file_bytes"] == 4000
    assert "bf16" in counted["counting"]


def test_quantized_counts_what_is_on_disk(exported: Callable[..., Manifest]) -> None:
    """The rule for the dense policy never makes a quantized one smaller than its files."""
    quantization = QuantizationSpec("int4", 32, {})
    files = {VISION: 400, DECODER: 3600, results.TOKENIZER: 10}
    counted = results.sizes(exported(files, parameters=1000, quantization=quantization, dtype="int4"))
    assert counted["bytes"] == 4010


def test_a_known_allocation_shows_as_anonymous_memory() -> None:
    program = (
        "import json; from rlrc.benchmarks.measure.memory import read_process; a = read_process();"
        "held = bytearray(b'x' * 50_000_000); print(json.dumps([a, read_process()]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    before, after = json.loads(done.stdout)
    for key in ("rss", "pss", "anonymous"):
        assert after[key] - before[key] == pytest.approx(50e6, rel=0.05)
    assert abs(after["file"] - before["file"]) < 2e6
    assert after["peak"] >= after["rss"]


def test_command_measures_a_fresh_process(toy_artifact: Path, capsys: Any) -> None:
    assert main(["bench", "memory", str(toy_artifact), "--repeats", "2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    stages = [row["memory"][stage] for stage in memory.STAGES]
    assert [stage["peak"] for stage in stages] == sorted(stage["peak"] for stage in stages)
    assert stages[1]["rss"] > stages[0]["rss"] + 10e6  # numpy and the engine
    assert row["memory"]["own"]["pss"] < 50e6  # a policy of 0.1 MB
    assert row["memory"]["runs"] == 2
    low, high = row["memory"]["own_range"]["pss"]
    assert low <= row["memory"]["own"]["pss"] <= high
    assert list(row["memory"]["towers"]) == ["vision", "decoder"]
    assert set(row["graph_bytes"]) == {"vision", "decoder"}
    assert sum(row["graph_bytes"].values()) == row["file_bytes"]
    assert 0 < row["memory"]["page_cache"] <= row["file_bytes"]


def test_the_run_of_the_middle_and_the_spread() -> None:
    def run(pss: int) -> dict[str, Any]:
        stage = dict.fromkeys(("rss", "pss", "anonymous", "file", "used", "peak"), 100)
        return {"imported": stage, "running": {**stage, "pss": 100 + pss, "peak": 130}, "towers": {}}

    measured = memory.row([run(30), run(10), run(20)])["memory"]
    assert measured["own"] == {"rss": 0, "pss": 20, "anonymous": 0, "file": 0, "used": 0, "peak": 30}
    assert measured["own_range"]["pss"] == [10, 30]
    assert measured["running"]["pss"] == 120


def test_page_cache_of_a_file_that_was_dropped(tmp_path: Path) -> None:
    file, size = tmp_path / "weights", 300 * mmap.PAGESIZE + 17
    file.write_bytes(bytes(size))
    assert memory.page_cache(file) == size
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if memory.page_cache(file) == size:
        pytest.skip("this file system keeps its pages")
    assert memory.page_cache(file) < size / 10
    (tmp_path / "empty").touch()
    assert memory.page_cache(tmp_path / "empty") == 0


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"nowhere failed: .*expected an artifact"):
        memory.measure(tmp_path / "nowhere")
