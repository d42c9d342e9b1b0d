"""NVIDIA's parser and builder (TensorRT-RTX, on the CPU) take every family's graphs in every precision.

RLRC_TENSORRT_PYTHON: the interpreter of an environment that has the extra tensorrt-check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from families import DATA, FAMILIES, flags  # noqa: E402
from rlrc import artifact as artifacts  # noqa: E402
from rlrc.artifact.precisions import CHOICES, OVERFLOWS  # noqa: E402
from rlrc.compressor.prune.prune import PruneConfig  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig  # noqa: E402
from rlrc.compressor.stages import prune, quantize  # noqa: E402
from rlrc.compressor.stages.stage import StageOptions  # noqa: E402
from rlrc.exporters.export import export  # noqa: E402

PYTHON = os.environ.get("RLRC_TENSORRT_PYTHON", sys.executable)
QUIET = StageOptions(evaluate=0, workers=1, threads=1)
PATH = os.pathsep.join(entry for entry in sys.path if entry.endswith(("runtime", "jetson")))


def rlrc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "rlrc.runtime.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": PATH}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def tensorrt() -> None:
    code = "from rlrc.jetson.board.check import rtx; rtx()"
    done = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATH}, check=False
    )
    if done.returncode:
        pytest.skip(f"no TensorRT-RTX for {PYTHON}; set RLRC_TENSORRT_PYTHON")


@pytest.mark.slow
@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("kind", ["dense", "pruned", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nvidia_builds_the_graphs(name: str, kind: str, tmp_path: Path) -> None:
    source = DATA / name / "checkpoint"
    if kind == "int4":
        quantize.run_quantize(source, tmp_path / kind, QuantizeConfig(), QUIET, flags(name))
    else:
        keep = 0 if name in ("act", "openvla-oft-l1") else 1
        config = PruneConfig(ratio=0.5, score="magnitude", keep=keep)
        config = config if kind == "pruned" else PruneConfig(lossless=True)
        prune.run_prune(source, tmp_path / kind, config, QUIET, flags(name))
    parent = artifacts.load(tmp_path / kind)
    for precision in CHOICES["tensorrt"]["int4" if kind == "int4" else "float"]:
        if precision == "fp16" and parent.manifest.policy.family in OVERFLOWS:
            continue
        out = tmp_path / f"to-{precision}"
        export(parent, out, ("tensorrt",), precision, tolerance=100.0)
        done = rlrc("jetson", "check", str(out), "--sm", "89" if precision == "fp8" else "86", "--json")
        result = json.loads(done.stdout)
        assert done.returncode == 0, result
        assert all(graph["engine_bytes"] > 0 for graph in result["graphs"])


@pytest.mark.usefixtures("tensorrt")
def test_what_nvidia_refuses_is_told(tiny_artifact: Path, tmp_path: Path) -> None:
    export(artifacts.load(tiny_artifact), tmp_path / "out", ("tensorrt",), "fp16", tolerance=100.0)
    done = rlrc("jetson", "check", str(tmp_path / "out"), "--sm", "87")
    assert done.returncode == 2
    assert "expected a target of 75, 80, 86, 89, 120, found 87" in done.stderr
    model = onnx.load(tmp_path / "out/graphs/tensorrt/vision.onnx")
    model.graph.node[-1].op_type = "Unheard"
    original = artifacts.load(tmp_path / "out")
    with artifacts.create_artifact(tmp_path / "other") as draft:
        draft.inherit(original, *(name for name in original.manifest.files if not name.endswith("vision.onnx")))
        draft.file("graphs/tensorrt/vision.onnx").write_bytes(model.SerializeToString())
        draft.finish(original.manifest)
    done = rlrc("jetson", "check", str(tmp_path / "other"), "--json")
    assert done.returncode == 1
    vision, decoder = json.loads(done.stdout)["graphs"]
    assert "Unheard" in vision["failure"]
    assert "another --precision" in vision["failure"]
    assert decoder["failure"] is None


API = """
from rlrc.jetson.board.check import rtx
trt = rtx()
for owner, name, *arguments in (
    (trt.Runtime, "deserialize_cuda_engine", "serialized_engine"),
    (trt.ICudaEngine, "create_execution_context", "strategy"),
    (trt.ICudaEngine, "num_optimization_profiles"),
    (trt.ICudaEngine, "device_memory_size_v2"),
    (trt.ExecutionContextAllocationStrategy, "USER_MANAGED"),
    (trt.IExecutionContext, "set_device_memory", "memory", "size"),
    (trt.IExecutionContext, "set_optimization_profile_async", "profile_index", "stream_handle"),
    (trt.IExecutionContext, "set_input_shape", "name", "shape"),
    (trt.IExecutionContext, "get_tensor_shape", "name"),
    (trt.IExecutionContext, "set_tensor_address", "name", "memory"),
    (trt.IExecutionContext, "execute_async_v3", "stream_handle"),
):
    told = getattr(owner, name).__doc__
    assert all(f"{argument}:" in told for argument in arguments), told
"""
CUDA = """
from rlrc.runtime.inference.backends import cuda
from rlrc.runtime.inference.decode import NoAction
try:
    print(cuda.Cuda().stream)
except NoAction as error:
    print(error)
"""


@pytest.mark.usefixtures("tensorrt")
def test_the_runtime_calls_what_nvidia_offers() -> None:
    """Names and arguments of all that the TensorRT backend calls; without a GPU it cannot be called."""
    done = subprocess.run(
        [PYTHON, "-c", API], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATH}, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("tensorrt")
def test_cuda_without_a_driver_says_so() -> None:
    done = subprocess.run(
        [PYTHON, "-c", CUDA], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATH}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cudaStreamCreateWithFlags failed: ") or done.stdout.strip().isdigit()


def test_without_the_wheel_one_line_says_so(tiny_artifact: Path, tmp_path: Path) -> None:
    if sys.executable != PYTHON:
        pytest.skip("it is installed there")
    export(artifacts.load(tiny_artifact), tmp_path / "out", ("tensorrt",), "fp16", tolerance=100.0)
    done = rlrc("jetson", "check", str(tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "expected TensorRT-RTX, found none; run pip install 'rlrc[tensorrt-check]'" in line
