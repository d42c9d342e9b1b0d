"""The TensorRT backend without a GPU: its memory and profiles by hand, its passes on a device that this machine plays.

Its calls to TensorRT and CUDA themselves: tests/test_jetson_check.py, as far as they go without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from played_tensorrt import Machine, Played

from families import FAMILIES, official
from rlrc import artifact as artifacts
from rlrc.artifact import Artifact, GraphSpec, TensorSpec
from rlrc.artifact.build_plan import PLAN, Bounds, GraphPlan, read_plan
from rlrc.compressor.stages import artifact_io
from rlrc.compressor.stages.sources import examples
from rlrc.errors import UserError
from rlrc.exporters.export import export
from rlrc.exporters.tensorrt.cpu_reference import CpuReferenceEngine
from rlrc.runtime.inference import backends
from rlrc.runtime.inference.backends import engine_cache, nvidia, tensorrt
from rlrc.runtime.inference.backends.tensorrt_memory import (
    Buffer,
    Repeats,
    RetainedTensor,
    input_shapes,
    links,
    profile_of,
)
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.inference.verify import read_golden

OF = Callable[[str], Artifact]


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> OF:
    """The artifact of a family with fp32 graphs for TensorRT; each is made once."""
    folder, made = tmp_path_factory.mktemp("artifacts"), dict[str, Artifact]()

    def make(name: str) -> Artifact:
        if name not in made:
            source, policy = official(name)
            with artifacts.create_artifact(folder / name) as draft:
                source.copy_files(draft)
                artifact_io.write_policy(draft, policy, examples(policy.spec, source.tokenizer), (), exact=True)
            export(artifacts.load(folder / name), folder / f"{name}-exported", ("tensorrt",), "fp32")
            made[name] = artifacts.load(folder / f"{name}-exported")
        return made[name]

    return make


def observations(artifact: Artifact) -> list[dict[str, Any]]:
    golden = read_golden(artifact.file("golden.npz"), artifact.manifest.policy)
    return [golden.observation(i, artifact.manifest.policy) for i in range(len(golden))]


# Passes


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_are_those_of_the_same_graphs(name: str, of: OF) -> None:
    """Exactly: the sums are the same, only what lies between the passes differs. Four times, so that it repeats."""
    artifact, machine = of(name), Machine()
    found = LocalPolicy(artifact, backend="tensorrt", engine=Played(artifact, machine))
    expected = LocalPolicy(artifact, backend="tensorrt", engine=CpuReferenceEngine(artifact))
    for observation in observations(artifact) * 4:
        np.testing.assert_array_equal(found.infer(observation)["actions"], expected.infer(observation)["actions"])
    assert not machine.waiting


def test_repeated_passes_are_captured_once_and_replayed(of: OF) -> None:
    artifact, machine = of("smolvla"), Machine()
    policy = LocalPolicy(artifact, backend="tensorrt", engine=Played(artifact, machine))
    assert policy.spec.flow is not None
    steps, observation = policy.spec.flow.steps, observations(artifact)[0]
    policy.infer(observation)
    assert (machine.captures, machine.launches) == (1, steps - 2)  # the first two steps run
    policy.infer(observation)
    assert (machine.captures, machine.launches) == (1, 2 * steps - 2)
    policy.infer(observation)  # the third picture, the third prefix
    assert (machine.captures, machine.launches) == (3, 3 * steps - 2 + 2)


def test_what_cannot_be_captured_is_run_every_time(of: OF) -> None:
    class Uncapturable(Machine):
        def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
            super().capture(enqueue)
            raise NoAction("cudaStreamEndCapture failed: operation not permitted when stream is capturing")

    artifact, machine = of("act"), Uncapturable()
    found = LocalPolicy(artifact, backend="tensorrt", engine=Played(artifact, machine))
    expected = LocalPolicy(artifact, backend="tensorrt", engine=CpuReferenceEngine(artifact))
    observation = observations(artifact)[0]
    for _ in range(5):
        np.testing.assert_array_equal(found.infer(observation)["actions"], expected.infer(observation)["actions"])
    assert (machine.captures, machine.launches) == (2, 0)  # vision and decoder, tried once


def test_a_prefill_is_captured_although_keys_and_values_change_places(of: OF) -> None:
    """Tokens are not: every one has a longer past. The first action's memories are too small for its last tokens."""
    artifact, machine = of("openvla"), Machine()
    policy = LocalPolicy(artifact, backend="tensorrt", engine=Played(artifact, machine))
    observation = observations(artifact)[0]
    for _ in range(5):
        policy.infer(observation)
    assert (machine.captures, machine.launches) == (2, 3 + 2)  # vision from the third time on, prefill from the fourth


def test_a_sequence_must_go_on_or_start_anew(of: OF) -> None:
    artifact, machine = of("openvla"), Machine()
    engine = Played(artifact, machine)
    width = artifact.manifest.towers["decoder"].width
    count = read_plan(artifact.file(PLAN)).graphs[1].profiles[0]["image_tokens"].max[1]
    seen, ids = np.zeros((1, count, width), np.float32), np.ones((1, 5), np.int64)
    end = count + 5
    engine.run("decoder", {"image_tokens": seen, "ids": ids, "start": np.array([0]), "end": np.array([end])})
    step: dict[str, Any] = {"image_tokens": seen[:, :0], "ids": ids[:, :1]}
    with pytest.raises(NoAction, match=rf"from position 0 or {end}, found one from 3"):
        engine.run("decoder", step | {"start": np.array([3]), "end": np.array([4])})
    engine.run("decoder", step | {"start": np.array([end]), "end": np.array([end + 1])})
    with pytest.raises(NoAction, match=r"inputs of \"decoder\" within the range of its engine"):
        engine.run("decoder", {"image_tokens": seen[:, :0], "ids": ids, "start": np.array([0]), "end": np.array([5])})


def test_a_pass_that_fails_gives_no_action_and_the_next_one_starts_anew(of: OF) -> None:
    artifact, machine = of("openvla"), Machine()
    engine = Played(artifact, machine)
    policy, observation = LocalPolicy(artifact, backend="tensorrt", engine=engine), observations(artifact)[0]
    expected = policy.infer(observation)["actions"]
    decoder = engine._contexts["decoder"][1]
    execute, decoder.execute_async_v3 = decoder.execute_async_v3, lambda stream_handle: False  # type: ignore[method-assign]
    with pytest.raises(NoAction, match="expected the pass to run, found that TensorRT refused: no reason given"):
        policy.infer(observation)
    decoder.execute_async_v3 = execute  # type: ignore[method-assign]
    with pytest.raises(NoAction, match="from position 0 or 0"):
        engine.run("decoder", {"ids": np.ones((1, 1), np.int64), "start": np.array([20]), "end": np.array([21])})
    np.testing.assert_array_equal(policy.infer(observation)["actions"], expected)


# Memory and profiles


def test_memory_grows_with_room_to_spare_and_what_was_there_is_freed_first() -> None:
    machine = Machine()
    buffer = Buffer(machine.own)
    first = buffer.room(0).address
    assert len(machine.live[first].all) == 256
    assert buffer.room(256).address == first
    assert len(buffer.room(4096).host) == 0
    (memory,) = machine.live.values()
    assert len(memory.all) == 4608  # 4096 and an eighth, a multiple of 256
    address = buffer.room(4608).address
    assert [*machine.live] == [address]


def test_what_is_read_and_made_anew_changes_places() -> None:
    machine = Machine()
    kept = RetainedTensor(machine.own, 2)
    made = kept.write(10)
    assert made != kept.read()
    kept.swap()
    assert kept.read() == made
    other = kept.write(20)
    assert other != made
    kept.swap()
    assert (kept.read(), kept.write(10)) == (other, made)
    kept.begin()
    assert kept.write(10) == made  # as in the first pass of the sequence before
    once = RetainedTensor(machine.own, 1)
    assert once.write(10) == once.read()


def test_a_pass_is_captured_the_third_time() -> None:
    repeats = Repeats()
    assert [repeats.next("a") for _ in range(5)] == ["run", "run", "capture", "replay", "replay"]
    assert [repeats.next(signature) for signature in "bab"] == ["run", "run", "run"]
    assert [repeats.next("b") for _ in range(2)] == ["run", "capture"]
    repeats.forget()
    assert repeats.next("b") == "run"


SEEN = TensorSpec("image_tokens", "float32", (1, 4, 8))
KEY = TensorSpec("key.0", "float32", (1, 2, "length", 16))
PREFIX = GraphSpec("prefix", "tensorrt", "p.onnx", "fp32", (SEEN,), (KEY,), {})
STEP = GraphSpec("step", "tensorrt", "s.onnx", "fp32", (KEY, TensorSpec("x", "float32", (1, 5, 3))), (), {})
VISION = GraphSpec("vision", "tensorrt", "v.onnx", "fp32", (), (SEEN,), {})
PASTS = tuple(TensorSpec(f"{side}.0.key", "float32", ("batch", 2, side, 16)) for side in ("past", "present"))
DECODER = GraphSpec("decoder", "tensorrt", "d.onnx", "fp32", (SEEN, PASTS[0]), (PASTS[1],), {})


def test_keys_and_values_stay_on_the_device_and_image_tokens_do_not() -> None:
    flow = {graph.name: graph for graph in (VISION, PREFIX, STEP)}
    assert links(flow) == {("prefix", "key.0"): "key.0"}
    assert links({"vision": VISION, "decoder": DECODER}) == {("decoder", "present.0.key"): "past.0.key"}


def test_shapes_of_inputs_come_from_what_is_given_made_or_past() -> None:
    x = np.zeros((1, 5, 3), np.float32)
    assert input_shapes(STEP, {"x": x}, {"key.0": (1, 2, 9, 16)}, 0) == {"key.0": (1, 2, 9, 16), "x": (1, 5, 3)}
    seen = np.zeros((1, 4, 8), np.float32)
    expected = {"image_tokens": (1, 4, 8), "past.0.key": (1, 2, 11, 16)}
    assert input_shapes(DECODER, {"image_tokens": seen}, {}, 11) == expected


def test_the_profile_is_the_first_that_fits() -> None:
    short, long = Bounds((1, 1), (1, 2), (1, 4)), Bounds((1, 3), (1, 6), (1, 8))
    profiles = ({"ids": short}, {"ids": long})
    plan = GraphPlan("decoder", {"d.onnx": ""}, (TensorSpec("ids", "int64", (1, "length")),), profiles)
    assert [profile_of(plan, {"ids": (1, length)}) for length in (1, 3, 4, 5, 8)] == [0, 0, 0, 1, 1]
    with pytest.raises(NoAction, match=r"found \{'ids': \(1, 9\)\}"):
        profile_of(plan, {"ids": (1, 9)})


# Choosing and opening


def test_tensorrt_is_preferred_where_it_runs(of: OF, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = of("act").manifest
    graphs = manifest.graphs
    for backend in ("onnxruntime", "gguf"):
        graphs += (GraphSpec("vision", backend, "f", "fp32", (), (), {}),)
    manifest = artifacts.from_json(artifacts.to_json(manifest))
    object.__setattr__(manifest, "graphs", graphs)
    monkeypatch.setattr(backends, "runs_tensorrt", lambda: True)
    assert backends.list_backends(manifest) == backends.list_runnable(manifest) == ["tensorrt", "onnxruntime", "gguf"]
    monkeypatch.setattr(backends, "runs_tensorrt", lambda: False)
    assert backends.choose(manifest) == "onnxruntime"
    assert backends.list_backends(manifest) == ["onnxruntime", "gguf", "tensorrt"]
    assert backends.list_runnable(manifest) == ["onnxruntime", "gguf"]


def test_without_a_driver_one_line_says_so_before_tensorrt_is_touched(of: OF, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "DRIVER", "libcuda-that-is-not-there.so.1")
    monkeypatch.setattr(nvidia, "import_tensorrt", lambda: pytest.fail("TensorRT may end the process"))
    assert not nvidia.runs_tensorrt()
    with pytest.raises(UserError, match=r"expected NVIDIA's driver .*found none; run this on the device itself"):
        LocalPolicy.load(of("act").path, backend="tensorrt")


def test_engines_that_were_not_built_are_asked_for(of: OF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = of("act")
    plan = read_plan(artifact.file(PLAN))
    monkeypatch.setenv(engine_cache.FOLDER, str(tmp_path))
    with pytest.raises(UserError, match=r"found none of vision, decoder; run rlrc jetson build .*or choose another"):
        tensorrt.engine_files(artifact.path, plan, "10.3.0", 87)
    expected = {graph.name: engine_cache.engine_file(tmp_path, plan, graph, "10.3.0", 87) for graph in plan.graphs}
    for file in expected.values():
        file.write_bytes(b"engine")
        file.with_suffix(".sha256").write_text(engine_cache.sha256(file))
    assert tensorrt.engine_files(artifact.path, plan, "10.3.0", 87) == expected
    expected["vision"].write_bytes(b"engin")
    with pytest.raises(UserError, match=r"found none of vision; run"):
        tensorrt.engine_files(artifact.path, plan, "10.3.0", 87)


def test_the_cache_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (engine_cache.FOLDER, "RLRC_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert engine_cache.engine_cache() == Path("/caches/rlrc/engines")
    monkeypatch.setenv(engine_cache.FOLDER, "/elsewhere")
    assert engine_cache.engine_cache() == Path("/elsewhere")
