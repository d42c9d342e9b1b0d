"""plan.json: there and back, what contradicts itself, and what the device refuses before anything is built."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import GraphSpec, Manifest, TensorSpec
from rlrc.artifact.build_plan import PLAN, Bounds, BuildPlan, GraphPlan, fits, read_plan, write_plan
from rlrc.errors import UserError
from rlrc.jetson.board import build as building
from rlrc.runtime.cli import main
from rlrc.runtime.inference.backends import engine_cache, nvidia
from rlrc.runtime.inference.backends.nvidia import check_version
from rlrc.strict import StrictError

INPUTS = (TensorSpec("image_tokens", "float32", (1, "image_tokens", 8)), TensorSpec("ids", "int64", (1, "length")))
PREFILL = {
    "image_tokens": Bounds((1, 16, 8), (1, 16, 8), (1, 32, 8)),
    "ids": Bounds((1, 1), (1, 12), (1, 24)),
}
STEP = {"image_tokens": Bounds((1, 0, 8), (1, 0, 8), (1, 0, 8)), "ids": Bounds((1, 1), (1, 1), (1, 1))}
FILE = "graphs/tensorrt/decoder.onnx"
DECODER = GraphPlan("decoder", {FILE: hashlib.sha256(b"graph").hexdigest()}, INPUTS, (PREFILL, STEP))
BUILD = BuildPlan("int4", "10.3", 80, 2**30, (DECODER,), int4_block=32)


def test_a_plan_there_and_back(tmp_path: Path) -> None:
    write_plan(BUILD, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == BUILD


def test_shapes_fit_a_profile_or_not() -> None:
    given = {"image_tokens": (1, 32, 8), "ids": (1, 5)}
    assert fits(PREFILL, given)
    assert not fits(STEP, given)
    assert not fits(PREFILL, given | {"image_tokens": (1, 33, 8)})
    assert not fits(PREFILL, given | {"ids": (1, 5, 1)})
    assert fits(STEP, {"image_tokens": (1, 0, 8), "ids": (1, 1)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "fp6"}, "precision"),
        ({"strongly_typed": False}, "strongly_typed"),
        ({"format_version": 2}, "format_version 1, found 2"),
        ({"graphs": []}, "graphs with distinct names, found none"),
        ({"extra": 1}, "extra"),
        ({"least_sm": "8.0"}, "least_sm"),
    ],
)
def test_plans_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write_plan(BUILD, tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=rf"{reason}.*run rlrc export again"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        ({"ids": STEP["ids"]}, r"bounds of image_tokens, ids in profile 0 of the graph decoder, found ids"),
        (STEP | {"ids": Bounds((1, 2), (1, 1), (1, 3))}, r"in order for ids"),
        (STEP | {"ids": Bounds((1,), (1,), (1,))}, r"2 dimensions of ids"),
        (STEP | {"ids": Bounds((1, -1), (1, 1), (1, 1))}, r"in order for ids"),
        (STEP | {"ids": Bounds((1, 1), (1, 1), (2, 1))}, r"bounds of \(1, 'length'\)"),  # the batch is fixed
    ],
)
def test_profiles_that_do_not_fit_are_refused(tmp_path: Path, profile: dict[str, Bounds], reason: str) -> None:
    with pytest.raises(StrictError, match=reason):
        write_plan(replace(BUILD, graphs=(replace(DECODER, profiles=(profile,)),)), tmp_path / "plan.json")


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_plan(tmp_path / "plan.json")


def test_the_device_side_imports_neither_torch_nor_onnx_nor_tensorrt() -> None:
    code = (
        "import sys, rlrc.jetson.cli.engines; print(*{'torch', 'onnx', 'onnxruntime', 'tensorrt'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == ""


# The device


def write(out: Path, manifest: Manifest, content: bytes = b"graph") -> Path:
    with artifacts.create_artifact(out) as draft:
        draft.file(FILE).write_bytes(content)
        write_plan(BUILD, draft.file(PLAN))
        spec = GraphSpec("decoder", "tensorrt", FILE, "int4", INPUTS, (), {"tensorrt": ">=10.3"})
        files = {name: artifacts.FileSpec("", 0) for name in (FILE, PLAN)}
        draft.finish(replace(manifest, graphs=(spec,), files=files))
    return out


def test_without_a_driver_nothing_is_built(
    tiny_manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        nvidia.device_sm()
        pytest.skip("this machine has a GPU")
    except UserError:
        pass
    path = write(tmp_path / "artifact", tiny_manifest)
    assert main(["jetson", "build", str(path), "--engine-cache", str(tmp_path / "cache")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "libcuda.so.1" in line or "cuInit" in line
    assert not (tmp_path / "cache").exists()


def test_without_tensorrt_nothing_is_built(
    tiny_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "device_sm", lambda: 87)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    path = write(tmp_path / "artifact", tiny_manifest)
    with pytest.raises(UserError, match=r"expected the module tensorrt, found.*JetPack"):
        list(building.build(path, tmp_path / "cache", lambda *_: None))
    assert not (tmp_path / "cache").exists()


def test_a_plan_of_another_graph_is_refused(tiny_manifest: Manifest, tmp_path: Path) -> None:
    path = write(tmp_path / "artifact", tiny_manifest, content=b"another graph")
    with pytest.raises(UserError, match=r"expected graphs/tensorrt/decoder.onnx with the sha256"):
        list(building.build(path, tmp_path / "cache", lambda *_: None))


def test_gpus_and_releases_too_old_are_refused() -> None:
    nvidia.check_sm(BUILD, 87)
    with pytest.raises(UserError, match=r"SM 8\.0 or later for int4, found SM 7\.2"):
        nvidia.check_sm(BUILD, 72)

    class TensorRT:
        __name__, __version__ = "tensorrt", "10.3.0.26"

    check_version(TensorRT, BUILD)
    TensorRT.__version__ = "10.0.1"
    with pytest.raises(UserError, match=r"TensorRT 10\.3 or later for these graphs, found 10\.0\.1"):
        check_version(TensorRT, BUILD)


def test_an_engine_is_named_by_all_that_it_depends_on() -> None:
    other = replace(DECODER, files={FILE: "0" * 64}), replace(DECODER, profiles=(PREFILL,))
    keys = [
        engine_cache.engine_key(BUILD, DECODER, "10.3.0.26", 87),
        engine_cache.engine_key(BUILD, DECODER, "10.3.0.27", 87),
        engine_cache.engine_key(BUILD, DECODER, "10.3.0.26", 110),
        engine_cache.engine_key(replace(BUILD, workspace_bytes=2**29), DECODER, "10.3.0.26", 87),
        *(engine_cache.engine_key(BUILD, graph, "10.3.0.26", 87) for graph in other),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == engine_cache.engine_key(BUILD, DECODER, "10.3.0.26", 87)


def test_half_an_engine_is_none(tmp_path: Path) -> None:
    file = tmp_path / "decoder.engine"
    assert not engine_cache.is_intact(file)
    building.write_atomically(file, b"engine")
    assert not engine_cache.is_intact(file)
    building.write_atomically(file.with_suffix(".sha256"), hashlib.sha256(b"engine").hexdigest().encode())
    assert engine_cache.is_intact(file)
    file.write_bytes(b"engi")
    assert not engine_cache.is_intact(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.engine", "decoder.sha256"]


@pytest.mark.parametrize(
    ("free_mib", "swapped_mib", "reason"),
    [
        (4000, 0, None),
        (4000, 64, None),  # what nobody has used for long may go
        (4000, 65, r"the board began to swap \(65 MiB\)"),
        (255, 0, "less than 256 MiB of memory were left"),
    ],
)
def test_a_build_that_takes_too_much_is_given_up(
    tmp_path: Path, free_mib: int, swapped_mib: int, reason: str | None
) -> None:
    before = 100 << 20
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: 8000000 kB\nMemAvailable: {free_mib << 10} kB\nSwapTotal: 2097152 kB\n"
        f"SwapFree: {2097152 - ((100 + swapped_mib) << 10)} kB\n"
    )
    found = building.short_of_memory(before, tmp_path)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.match(reason, found)
