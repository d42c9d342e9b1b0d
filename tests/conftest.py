"""Fixtures of all tests: artifacts small enough to be made in a moment.

``toy_artifact`` needs no torch: its two hand-made ONNX graphs are a linear policy, which ``Toy`` computes in numpy too.
``tiny_artifact`` is a random policy of the family "tiny" without graphs, as the compressor writes it.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before anything starts a thread pool; tests are about results, not speed

import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import (
    ActionSpec,
    CameraSpec,
    GraphSpec,
    HistoryEntry,
    LayerSpec,
    Manifest,
    NormStats,
    PolicySpec,
    PromptSpec,
    StateSpec,
    TensorSpec,
    TowerSpec,
    VerifiedSpec,
)
from rlrc.runtime.inference.backends.kernels import kernels

# Jobs of nohup and of a shell's background ignore these signals, and so would the commands that the tests interrupt.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


WORDS = ("[PAD]", "[UNK]", "open", "close", "the", "drawer", "window")
TOKENIZER, GOLDEN = "tokenizer/tokenizer.json", "golden.npz"
VISION, DECODER = "graphs/onnx/vision.onnx", "graphs/onnx/decoder.onnx"


def policy_spec(size: int = 32) -> PolicySpec:
    """One square camera, three state dimensions, chunks of 3 steps of 4 dimensions in 32 bins; units that differ."""
    return PolicySpec(
        family="tiny",
        decode="parallel",
        cameras=(CameraSpec("corner4", size, size, "none", (0.5, 0.4, 0.3), (0.25, 0.2, 0.125), "HWC"),),
        state=StateSpec(("x", "y", "grip"), ("m", "m", "1"), NormStats((0.0, 0.6, 0.5), (0.5, 0.25, 0.5), clip=5.0)),
        prompt=PromptSpec("{instruction}", max_tokens=5, pad_id=0),
        action=ActionSpec(
            3,
            ("dx", "dy", "dz", "gripper"),
            ("delta", "delta", "delta", "gripper"),
            ("m", "m", "m", "1"),
            NormStats((0.0, 0.0, 0.0, 0.5), (0.02, 0.02, 0.04, 0.5)),
            32,
        ),
        geometry={"vocabulary": len(WORDS), "stem_factors": [4, 2], "stem_widths": [16], "merge": 2},
    )


def manifest() -> Manifest:
    towers = {
        "vision": TowerSpec(32, (LayerSpec(2, 2, 16, 32),)),
        "decoder": TowerSpec(64, (LayerSpec(4, 4, 16, 128), LayerSpec(2, 1, 16, 64), LayerSpec(4, 4, 16, 128))),
    }
    history = (HistoryEntry("new", {"seed": 0}, "0.1.0", None, 0.0, after={"success": 0.25}),)
    return Manifest(policy_spec(), towers, parameters=0, dtype="float32", history=history)


@pytest.fixture(scope="session")
def tiny_manifest() -> Manifest:
    """The description of a small policy of the family "tiny"; ``dataclasses.replace`` makes others of it."""
    return manifest()


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """Writes a tokenizer of whole words that knows ``WORDS``: open close the drawer window."""
    return _write_tokenizer


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def raw_observations(spec: PolicySpec, number: int = 8) -> dict[str, np.ndarray]:
    """Random pictures and states with instructions in turn, as golden.npz names them."""
    random = np.random.default_rng(7)
    instructions = [("open the drawer", "close the window")[i % 2] for i in range(number)]
    ids = [[WORDS.index(word) for word in text.split()] for text in instructions]
    raw: dict[str, np.ndarray] = {
        f"image.{camera.name}": random.integers(0, 256, (number, camera.height, camera.width, 3), np.uint8)
        for camera in spec.cameras
    }
    if spec.state is not None:
        raw["state"] = random.uniform(0, 1, (number, len(spec.state.names))).astype(np.float32)
    if spec.prompt is not None:
        raw["instructions"] = np.array(instructions)
        raw["ids"] = np.array([row + [0] * (spec.prompt.max_tokens - len(row)) for row in ids], np.int64)
    return raw


@pytest.fixture
def observation() -> dict[str, Any]:
    """One observation that fits ``tiny_manifest``; the first of the toy artifact's golden.npz."""
    raw = raw_observations(policy_spec())
    return {
        "image.corner4": raw["image.corner4"][0],
        "state": raw["state"][0],
        "instruction": str(raw["instructions"][0]),
    }


@dataclass(frozen=True)
class Toy:
    """The linear policy of the hand-made graphs, in numpy: the reference that the graphs are compared with."""

    pixels: np.ndarray  # (H * W * 3 / BANDS, D)
    embedding: np.ndarray  # (words, D)
    state: np.ndarray  # (S, D)
    head: np.ndarray  # (D, horizon * dim * bins)

    BANDS = 4  # an image token per horizontal band of the picture

    @staticmethod
    def random(spec: PolicySpec, width: int = 8) -> Toy:
        random = np.random.default_rng(0)
        camera, action = spec.cameras[0], spec.action
        assert spec.state is not None

        def weight(inputs: int, outputs: int) -> np.ndarray:
            return (random.standard_normal((inputs, outputs)) / inputs**0.5).astype(np.float32)

        return Toy(
            weight(camera.height * camera.width * 3 // Toy.BANDS, width),
            weight(len(WORDS), width),
            weight(len(spec.state.names), width),
            weight(width, action.horizon * action.dim * action.bins) * 3,
        )

    def logits(self, spec: PolicySpec, observations: dict[str, np.ndarray]) -> np.ndarray:
        """Raw observations -> (N, horizon, dim, bins) in float64, by the formulas of the specs written out."""
        camera, action = spec.cameras[0], spec.action
        assert spec.state is not None
        pixels = (observations[f"image.{camera.name}"] / 255.0 - camera.mean) / camera.std
        tokens = pixels.reshape(len(pixels), self.BANDS, -1) @ self.pixels
        state = ((observations["state"] - np.array(spec.state.norm.center)) / np.array(spec.state.norm.scale)).clip(
            -5, 5
        )
        hidden = tokens.mean(1) + self.embedding[observations["ids"]].mean(1) + state @ self.state
        return (hidden @ self.head).reshape(len(pixels), action.horizon, action.dim, action.bins)

    def write(self, vision: Path, decoder: Path, spec: PolicySpec) -> None:
        """The same as two ONNX graphs with the runtime's interface."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        camera, action, width = spec.cameras[0], spec.action, self.head.shape[0]
        assert spec.state is not None
        chunk = (action.horizon, action.dim, action.bins)

        def tensor(name: str, kind: int, *shape: int) -> Any:
            return helper.make_tensor_value_info(name, kind, ["batch", *shape])

        def save(path: Path, nodes: list, inputs: list, output: Any, constants: dict[str, np.ndarray]) -> None:
            initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
            graph = helper.make_graph(nodes, path.stem, inputs, [output], initializers)
            opset = [helper.make_opsetid("", 18)]
            onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)

        image_tokens = tensor("image_tokens", TensorProto.FLOAT, self.BANDS, width)
        save(
            vision,
            [
                helper.make_node("Reshape", ["pixels", "bands"], ["flat"]),
                helper.make_node("MatMul", ["flat", "weight"], ["image_tokens"]),
            ],
            [tensor("pixels", TensorProto.FLOAT, camera.height, camera.width, 3)],
            image_tokens,
            {"bands": np.array([0, self.BANDS, self.pixels.shape[0]]), "weight": self.pixels},
        )
        save(
            decoder,
            [
                helper.make_node("ReduceMean", ["image_tokens", "one"], ["seen"], keepdims=0),
                helper.make_node("Gather", ["embedding", "ids"], ["words"]),
                helper.make_node("ReduceMean", ["words", "one"], ["told"], keepdims=0),
                helper.make_node("MatMul", ["state", "state_weight"], ["felt"]),
                helper.make_node("Sum", ["seen", "told", "felt"], ["hidden"]),
                helper.make_node("MatMul", ["hidden", "head"], ["flat"]),
                helper.make_node("Reshape", ["flat", "chunk"], ["logits"]),
            ],
            [
                image_tokens,
                tensor("ids", TensorProto.INT64, spec.prompt.max_tokens),
                tensor("state", TensorProto.FLOAT, len(spec.state.names)),
            ],
            tensor("logits", TensorProto.FLOAT, *chunk),
            {
                "one": np.array([1]),
                "embedding": self.embedding,
                "state_weight": self.state,
                "head": self.head,
                "chunk": np.array([0, *chunk]),
            },
        )


def toy_graphs(spec: PolicySpec, width: int = 8) -> tuple[GraphSpec, GraphSpec]:
    camera, action = spec.cameras[0], spec.action
    image_tokens = TensorSpec("image_tokens", "float32", ("batch", Toy.BANDS, width))
    needs = {"onnxruntime": ">=1.18"}
    pixels = TensorSpec("pixels", "float32", ("batch", camera.height, camera.width, 3))
    ids = TensorSpec("ids", "int64", ("batch", spec.prompt.max_tokens))
    state = TensorSpec("state", "float32", ("batch", len(spec.state.names) if spec.state else 0))
    logits = TensorSpec("logits", "float32", ("batch", action.horizon, action.dim, action.bins))
    return (
        GraphSpec("vision", "onnxruntime", VISION, "float32", (pixels,), (image_tokens,), needs),
        GraphSpec("decoder", "onnxruntime", DECODER, "float32", (image_tokens, ids, state), (logits,), needs),
    )


def write_toy(out: Path, spec: PolicySpec | None = None, weights: Toy | None = None, **changes: Any) -> Path:
    """An exported artifact with a record of agreement.

    With ``weights`` its graphs compute something else than its golden outputs; ``changes`` replace manifest fields.
    """
    spec = spec or policy_spec()
    toy, raw = Toy.random(spec), dict[str, Any](raw_observations(spec))
    logits = toy.logits(spec, raw).astype(np.float32)
    tokens, action = logits.argmax(-1), spec.action
    centers = ((tokens + 0.5) / action.bins * 2 - 1).astype(np.float32)
    actions = (centers * np.array(action.norm.scale) + np.array(action.norm.center)).astype(np.float32)
    here = {"onnxruntime": version("onnxruntime"), "kernels": kernels()}
    record = VerifiedSpec("onnxruntime", len(tokens), tokens.size, 0, 0, (0.0,) * action.dim, 0.0, 0.000625, here)
    described = replace(manifest(), policy=spec, graphs=toy_graphs(spec), verified=(record,))
    with artifacts.create_artifact(out) as draft:
        (weights or toy).write(draft.file(VISION), draft.file(DECODER), spec)
        _write_tokenizer(draft.file(TOKENIZER))
        np.savez(draft.file(GOLDEN), logits=logits, tokens=tokens, actions=actions, **raw)
        draft.finish(replace(described, **changes))
    return out


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., Path]:
    """``make_toy(out, spec=None, weights=None, **changes)``: writes another toy artifact, see ``write_toy``."""
    return write_toy


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy.random(policy_spec())


@pytest.fixture(scope="session")
def toy_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported artifact, shared by all tests: copy it before you damage it."""
    return write_toy(tmp_path_factory.mktemp("artifacts") / "toy")


@pytest.fixture(scope="session")
def metaworld_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy artifact that takes what Meta-World gives, a state of seven numbers, and answers in its range."""
    state = StateSpec(tuple("abcdefg"), ("m",) * 7, NormStats((0.0,) * 7, (1.0,) * 7))
    spec = policy_spec()
    spec = replace(spec, state=state, action=replace(spec.action, norm=NormStats((0.0,) * 4, (1.0,) * 4)))
    return write_toy(tmp_path_factory.mktemp("artifacts") / "metaworld_toy", spec)


@pytest.fixture(scope="session")
def arm_spec() -> PolicySpec:
    """What the policy of a simulated arm sees and does: two joints that go where they are told, and the camera."""
    spec, norm, joints, units = policy_spec(), NormStats((0.0, 0.0), (1.0, 1.0)), ("shoulder", "elbow"), ("rad", "rad")
    action = replace(spec.action, names=joints, meaning=("absolute",) * 2, units=units, norm=norm)
    return replace(spec, state=StateSpec(joints, units, norm), action=action)


@pytest.fixture(scope="session")
def arm_toy(arm_spec: PolicySpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy artifact that moves such an arm about."""
    return write_toy(tmp_path_factory.mktemp("artifacts") / "arm_toy", arm_spec)


@pytest.fixture
def own_toy(toy_artifact: Path, tmp_path: Path) -> Path:
    """A copy of ``toy_artifact`` to damage."""
    return Path(shutil.copytree(toy_artifact, tmp_path / "toy"))


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy of the family "tiny" in bfloat16, not exported; shared by all: copy it before you damage it."""
    return _write_tiny(tmp_path_factory.mktemp("artifacts") / "tiny")


@pytest.fixture(scope="session")
def tiny_int4_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_artifact`` in four bits."""
    from rlrc.compressor.quantize.quantize import QuantizeConfig

    return _write_tiny(tmp_path_factory.mktemp("artifacts") / "int4", QuantizeConfig())


def _write_tiny(out: Path, quantization: Any = None) -> Path:
    import torch

    from rlrc.compressor.models.tiny import TinyPolicy
    from rlrc.compressor.quantize.quantize import quantize
    from rlrc.compressor.stages import artifact_io

    described = manifest()
    torch.manual_seed(0)
    policy = TinyPolicy(described.policy, described.towers)
    with torch.no_grad():
        policy.head.weight *= 100  # decided logits, as a trained policy has them
    with artifacts.create_artifact(out) as draft:
        _write_tokenizer(draft.file(TOKENIZER))
        raw = raw_observations(described.policy)
        result = None if quantization is None else quantize(policy, quantization)
        artifact_io.write_policy(draft, policy, raw, described.history, result)
    return out


@pytest.fixture(scope="session")
def pupil_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy for Meta-World, small enough to be trained in a test; shared by all."""
    import torch

    from rlrc.compressor.models.tiny import TinyPolicy
    from rlrc.compressor.stages import artifact_io, reference
    from rlrc.runtime.inference.preprocess import Tokenizer

    spec = reference.policy_spec(size=32, bins=16, horizon=5)
    spec = replace(spec, geometry=spec.geometry | {"stem_factors": [4, 2], "stem_widths": [16]})
    towers = {
        "vision": TowerSpec(32, (LayerSpec(2, 2, 16, 32),)),
        "decoder": TowerSpec(64, (LayerSpec(4, 4, 32, 128),) * 4),
    }
    torch.manual_seed(0)
    policy, out = TinyPolicy(spec, towers), tmp_path_factory.mktemp("artifacts") / "pupil"
    with artifacts.create_artifact(out) as draft:
        reference.write_tokenizer(draft.file(TOKENIZER))
        raw = raw_observations(spec)
        tokenizer = Tokenizer(draft.file(TOKENIZER), spec.prompt)
        raw["ids"] = np.stack([tokenizer(str(text)) for text in raw["instructions"]])
        artifact_io.write_policy(draft, policy, raw, (HistoryEntry("new", {"seed": 0}, "0.1.0", None, 0.0),))
    return out


@pytest.fixture(scope="session")
def make_pupil(pupil_artifact: Path) -> Callable[[], Any]:
    """The policy of ``pupil_artifact`` in float32, as often as wanted."""
    from rlrc.compressor.models.nn.linear import widen
    from rlrc.compressor.stages import artifact_io

    return lambda: widen(artifact_io.load_policy(artifacts.load(pupil_artifact)))


@pytest.fixture
def pupil(make_pupil: Callable[[], Any]) -> Any:
    """The policy of ``pupil_artifact``, to train or to change."""
    return make_pupil()


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty $RLRC_CACHE, but for the decimated meshes, for the rest of the session."""
    from rlrc.envs.render import make_light_assets

    assets = make_light_assets()
    folder = tmp_path_factory.mktemp("cache")
    (folder / assets.name).symlink_to(assets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLRC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def rollouts(pupil_artifact: Path, own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Episodes of ``pupil`` in one worker process, which all tests share: it takes seconds to start."""
    from rlrc.compressor.rl.rollout import Rollouts

    artifact = artifacts.load(pupil_artifact)
    with Rollouts(artifact.manifest, artifact.file(TOKENIZER), tmp_path_factory.mktemp("rollouts"), workers=1) as pool:
        yield pool


@pytest.fixture(scope="session")
def demos(rollouts: Any) -> Any:
    """One expert demonstration of every task, as the stages find them in the cache with ``demonstrations=1``."""
    from rlrc.compressor.rl.demonstrations import DemonstrationConfig, demonstrations

    return demonstrations(DemonstrationConfig(1), rollouts)


@pytest.fixture(scope="session")
def check_requests() -> Callable[[Callable[[int, dict[str, float]], list[Any]], str], list[Any]]:
    """Checks three rounds of episodes, drawn by the number of the round and each task's failures, and returns them."""
    from rlrc.envs.metaworld import TASKS

    def check(draw: Callable[[int, dict[str, float]], list[Any]], failing: str) -> list[Any]:
        failures = dict.fromkeys(TASKS, 0.0) | {failing: 1.0}
        rounds = [draw(number, failures) for number in range(3)]
        assert rounds[1] == draw(1, failures)
        drawn = [request for one in rounds for request in one]
        assert len({request.seed for request in drawn}) == len(drawn)  # no scene comes twice
        count = Counter(request.task for request in rounds[0])
        assert count[failing] > 3 * max(number for task, number in count.items() if task != failing)
        return drawn

    return check


@pytest.fixture
def cut_short() -> Callable[..., None]:
    """Calls ``train(progress=...)`` as an interrupted and killed run: the state of step ``saved`` is what it leaves."""

    def cut(train: Callable[..., Any], saved: int, killed: int | None = None) -> None:
        for step, error in ((saved, KeyboardInterrupt()), (killed, RuntimeError("killed"))):

            def progress(done: int, text: str, step: int | None = step, error: BaseException = error) -> None:
                if done == step:
                    raise error

            if step is not None:
                with pytest.raises(type(error)):
                    train(progress=progress)

    return cut


@pytest.fixture
def tiny_policy(tiny_artifact: Path) -> tuple[Any, list[Any]]:
    """The policy of ``tiny_artifact``, to change, and its golden observations as Inputs."""
    from rlrc.compressor.stages import artifact_io

    artifact = artifacts.load(tiny_artifact)
    policy = artifact_io.load_policy(artifact)
    raw = artifact_io.read_observations(artifact.file(GOLDEN))
    return policy, list(artifact_io.every_input(policy.spec, raw))


@pytest.fixture
def official_policy() -> Callable[[str], tuple[Any, list[Any]]]:
    """The policy of the golden checkpoint of this name, and four observations as Inputs."""
    from families import source_of
    from rlrc.compressor.stages import artifact_io

    def load(name: str) -> tuple[Any, list[Any]]:
        source = source_of(name)
        return source.load(), list(artifact_io.every_input(source.spec, source.observations()))

    return load
