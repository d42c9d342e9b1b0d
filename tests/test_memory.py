"""Bytes that count, and the memory of a process that holds a known amount."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import FileSpec, Manifest, QuantizationSpec
from rlrc.benchmarks import memory, results
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
        "import json; from rlrc.benchmarks.memory import read_process; a = read_process();"
        "held = bytearray(b'x' * 50_000_000); print(json.dumps([a, read_process()]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    before, after = json.loads(done.stdout)
    for key in ("rss", "pss", "anonymous"):
        assert after[key] - before[key] == pytest.approx(50e6, rel=0.05)
    assert abs(after["file"] - before["file"]) < 2e6
    assert after["peak"] >= after["rss"]


def test_command_measures_a_fresh_process(toy_artifact: Path, capsys: Any) -> None:
    assert main(["bench", "memory", str(toy_artifact), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    stages = [row["memory"][stage] for stage in memory.STAGES]
    assert [stage["peak"] for stage in stages] == sorted(stage["peak"] for stage in stages)
    assert stages[1]["rss"] > stages[0]["rss"] + 10e6  # numpy and the engine
    assert row["memory"]["own"]["pss"] < 50e6  # a policy of 0.1 MB


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"nowhere failed: .*expected an artifact"):
        memory.measure(tmp_path / "nowhere")
