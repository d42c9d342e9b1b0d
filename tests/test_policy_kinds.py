"""LocalPolicy with several cameras and every way of decoding, on hand-made ONNX graphs that numpy computes too.

All numbers in the graphs are whole, so that every sum is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rlrc import artifact as artifacts
from rlrc.artifact import (
    ActionSpec,
    CameraSpec,
    FlowSpec,
    GraphSpec,
    LayerSpec,
    Manifest,
    NormStats,
    PolicySpec,
    PromptSpec,
    StateSpec,
    TensorSpec,
    TokenSpec,
    TowerSpec,
)
from rlrc.errors import UserError
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.decode import tokens_to_actions
from rlrc.runtime.inference.policy import LocalPolicy

KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
Tensors = dict[str, tuple[str, tuple[int | str, ...]]]


@dataclass(frozen=True)
class Graph:
    """Shapes after the batch dimension; nodes as (operator, inputs, output, attributes); constants by name."""

    name: str
    inputs: Tensors
    outputs: Tensors
    nodes: list[tuple[str, list[str], str, dict[str, Any]]]
    constants: dict[str, Any]

    @property
    def file(self) -> str:
        return f"graphs/onnx/{self.name}.onnx"

    def spec(self) -> GraphSpec:
        def tensors(declared: Tensors) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(name, kind, ("batch", *shape)) for name, (kind, shape) in declared.items())

        needs = {"onnxruntime": ">=1.18"}
        return GraphSpec(
            self.name, "onnxruntime", self.file, "float32", tensors(self.inputs), tensors(self.outputs), needs
        )

    def write(self, path: Path) -> None:
        def tensors(declared: Tensors) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, KINDS[kind], ["batch", *shape])
                for name, (kind, shape) in declared.items()
            ]

        nodes = [helper.make_node(op, given, [out], **attributes) for op, given, out, attributes in self.nodes]
        constants = [numpy_helper.from_array(np.array(value), name) for name, value in self.constants.items()]
        graph = helper.make_graph(nodes, self.name, tensors(self.inputs), tensors(self.outputs), constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


# Every picture becomes two image tokens of one number: the sums of its upper and of its lower half, in bytes.
VISION = Graph(
    "vision",
    {"pixels": ("float32", (4, 4, 3))},
    {"image_tokens": ("float32", (2, 1))},
    [
        ("Mul", ["pixels", "white"], "bytes", {}),
        ("Round", ["bytes"], "exact", {}),
        ("Reshape", ["exact", "halves"], "halved", {}),
        ("ReduceSum", ["halved", "last"], "image_tokens", {"keepdims": 1}),
    ],
    {"white": np.float32(255), "halves": [0, 2, 24], "last": [2]},
)
PAST: Tensors = {f"past.0.{part}": ("float32", (1, "past", 1)) for part in ("key", "value")}
PRESENT: Tensors = {name.replace("past", "present"): tensor for name, tensor in PAST.items()}
# The keys are all numbers given so far, the values their negatives; the row is the keys' sum modulo 6.
DECODER = Graph(
    "decoder",
    {"image_tokens": ("float32", ("seen", 1)), "ids": ("int64", ("length",)), **PAST},
    {"logits": ("float32", (6,)), **PRESENT},
    [
        ("Unsqueeze", ["image_tokens", "one"], "seen", {}),
        ("Cast", ["ids"], "words", {"to": TensorProto.FLOAT}),
        ("Reshape", ["words", "as_keys"], "told", {}),
        ("Concat", ["seen", "told"], "given", {"axis": 2}),
        ("Concat", ["past.0.key", "given"], "present.0.key", {"axis": 2}),
        ("Neg", ["given"], "negative", {}),
        ("Concat", ["past.0.value", "negative"], "present.0.value", {"axis": 2}),
        ("ReduceSum", ["present.0.key", "two"], "sum", {"keepdims": 0}),  # (batch, 1, 1)
        ("Reshape", ["sum", "column"], "sums", {}),
        ("Mod", ["sums", "six"], "row", {"fmod": 1}),
        ("Sub", ["rows", "row"], "distance", {}),
        ("Abs", ["distance"], "distances", {}),
        ("Neg", ["distances"], "logits", {}),
    ],
    {
        "one": [1],
        "two": [2],
        "as_keys": [0, 1, -1, 1],
        "column": [0, 1],
        "six": np.float32(6),
        "rows": np.arange(6, dtype=np.float32)[None],
    },
)
CACHE: Tensors = {f"{part}.0": ("float32", (1, "length", 1)) for part in ("key", "value")}
PREFIX = Graph(
    "prefix",
    {"image_tokens": ("float32", ("seen", 1)), "ids": ("int64", ("words",))},
    CACHE,
    [
        ("Unsqueeze", ["image_tokens", "one"], "seen", {}),
        ("Cast", ["ids"], "words", {"to": TensorProto.FLOAT}),
        ("Reshape", ["words", "as_keys"], "told", {}),
        ("Concat", ["seen", "told"], "key.0", {"axis": 2}),
        ("Neg", ["key.0"], "value.0", {}),
    ],
    {"one": [1], "as_keys": [0, 1, -1, 1]},
)
# velocity = x + t + the sum of the keys / 1000 + the state's sum; the values are read, and count nothing.
STEP = Graph(
    "step",
    {"x": ("float32", (2, 3)), "t": ("float32", ()), "state": ("float32", (4,)), **CACHE},
    {"velocity": ("float32", (2, 3))},
    [
        ("Add", ["key.0", "value.0"], "nothing", {}),
        ("Add", ["key.0", "nothing"], "keys", {}),
        ("ReduceSum", ["keys", "two"], "sum", {"keepdims": 0}),  # (batch, 1, 1)
        ("Div", ["sum", "thousand"], "prefix", {}),
        ("ReduceSum", ["state", "one"], "felt", {"keepdims": 1}),
        ("Reshape", ["felt", "column"], "feeling", {}),
        ("Reshape", ["t", "column"], "time", {}),
        ("Sum", ["x", "time", "prefix", "feeling"], "velocity", {}),
    ],
    {"one": [1], "two": [2], "column": [-1, 1, 1], "thousand": np.float32(1000)},
)
# actions = the state's four numbers, and the sum of the image tokens, each times its place, / 1000 in every one.
PARALLEL = Graph(
    "decoder",
    {"image_tokens": ("float32", (4, 1)), "state": ("float32", (4,))},
    {"actions": ("float32", (2, 2))},
    [
        ("Mul", ["image_tokens", "places"], "placed", {}),
        ("ReduceSum", ["placed", "one"], "sum", {"keepdims": 1}),
        ("Div", ["sum", "thousand"], "seen", {}),
        ("Reshape", ["state", "steps"], "felt", {}),
        ("Add", ["felt", "seen"], "actions", {}),
    ],
    {
        "one": [1],
        "steps": [0, 2, 2],
        "thousand": np.float32(1000),
        "places": np.arange(1, 5, dtype=np.float32)[None, :, None],
    },
)

LAYER = LayerSpec(1, 1, 1, 1)
NAMES = ("dx", "grip")


def camera(name: str, optional: bool = False) -> CameraSpec:
    return CameraSpec(name, 4, 4, "bilinear", (0.0,) * 3, (1.0,) * 3, "HWC", optional)


def action(bins: int, tokens: TokenSpec | None = None) -> ActionSpec:
    norm = NormStats((0.0, 0.5), (0.1, 0.5))
    return ActionSpec(2, NAMES, ("delta", "gripper"), ("m", "1"), norm, bins, tokens)


PROMPT = PromptSpec("the {instruction}", 9, None, suffix=(6,))
AUTOREGRESSIVE = PolicySpec(
    "any",
    "autoregressive",
    (camera("top"), camera("wrist", optional=True)),
    None,
    PROMPT,
    action(4, TokenSpec(6, 10, 14)),
    {},
)
STATE = StateSpec(NAMES, ("m", "1"), NormStats((1.0, 2.0), (0.5, 0.5)), width=4)
FLOW = replace(AUTOREGRESSIVE, decode="flow", state=STATE, action=action(0), flow=FlowSpec(2, 3))
CONTINUOUS = PolicySpec("any", "parallel", (camera("top"), camera("wrist")), STATE, None, action(0), {})
KIND = {
    "autoregressive": (AUTOREGRESSIVE, (VISION, DECODER)),
    "flow": (FLOW, (VISION, PREFIX, STEP)),
    "parallel": (CONTINUOUS, (VISION, PARALLEL)),
}


@pytest.fixture
def write(tmp_path: Path, write_tokenizer: Callable[[Path], None]) -> Callable[..., Path]:
    """``write(kind)``: an artifact of that kind, without a record; its description and graphs may be others."""

    def make(kind: str, spec: PolicySpec | None = None, graphs: tuple[Graph, ...] | None = None) -> Path:
        towers = {"decoder": TowerSpec(1, (LAYER,))}
        spec, graphs = spec or KIND[kind][0], graphs or KIND[kind][1]
        with artifacts.create_artifact(tmp_path / kind) as draft:
            for graph in graphs:
                graph.write(draft.file(graph.file))
            write_tokenizer(draft.file("tokenizer/tokenizer.json"))
            draft.finish(Manifest(spec, towers, 0, "float32", graphs=tuple(graph.spec() for graph in graphs)))
        return tmp_path / kind

    return make


def load(path: Path) -> LocalPolicy:
    return LocalPolicy.load(path, require_verified=False)


def picture(seed: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def greedy(numbers: list[int]) -> list[int]:
    """The tokens of DECODER after these numbers."""
    tokens: list[int] = []
    while len(tokens) < 4:
        tokens.append(10 + (sum(numbers) + sum(tokens)) % 6)
    return tokens


def test_autoregressive(write: Callable[..., Path]) -> None:
    policy = load(write("autoregressive"))
    top, wrist = picture(0), picture(1)
    # PAD UNK open close the drawer window are 0 to 6; 6 is appended.
    one = policy.infer({"image.top": top, "instruction": "open drawer"})
    assert one["tokens"] is not None
    assert one["tokens"].ravel().tolist() == greedy([int(top.sum()), 4, 2, 5, 6])
    two = policy.infer({"image.top": top, "image.wrist": wrist, "instruction": "open drawer window"})
    assert two["tokens"] is not None
    assert two["tokens"].ravel().tolist() == greedy([int(top.sum()), int(wrist.sum()), 4, 2, 5, 6])
    bins = np.clip(14 - two["tokens"], 0, 3)
    np.testing.assert_allclose(two["actions"], ((bins + 0.5) / 2 - 1) * [0.1, 0.5] + [0, 0.5], rtol=1e-6)
    again = policy.infer({"image.top": top, "instruction": "open drawer"})
    assert np.array_equal(again["tokens"], one["tokens"])  # nothing of the chunk between is left
    assert list(one["timing"]) == ["preprocess_ms", "vision_ms", "decoder_ms", "postprocess_ms"]
    assert all(milliseconds > 0 for milliseconds in dict[str, Any](one["timing"]).values())


def velocity_free(noise: np.ndarray, number: float) -> np.ndarray:
    """Two Euler steps of velocity x + t + number, un-normalised."""
    x = noise - (noise + 1 + number) / 2
    x = x - (x + 0.5 + number) / 2
    return x[:, :2] * [0.1, 0.5] + [0, 0.5]


def test_flow(write: Callable[..., Path]) -> None:
    policy = load(write("flow"))
    observation: dict[str, Any] = {"image.wrist": picture(1), "image.top": picture(0), "state": np.array([2.0, 1.0])}
    observation |= {"instruction": "open", "noise": np.arange(6, dtype=np.float64).reshape(2, 3)}
    # State (2 - 1) / 0.5 and (1 - 2) / 0.5, and two zeros: the sum is 0; so another one.
    observation["state"] = np.array([2.0, 3.5])
    number = (int(picture(0).sum()) + int(picture(1).sum()) + 4 + 2 + 6) / 1000 + (2 + 3)
    result = policy.infer(observation)
    assert result["tokens"] is None
    np.testing.assert_allclose(result["actions"], velocity_free(observation["noise"], number), rtol=1e-5)
    assert result["actions"].dtype == np.float32


def test_flow_draws_noise_that_a_reset_repeats(write: Callable[..., Path]) -> None:
    policy = load(write("flow"))
    observation = {"image.top": picture(0), "state": np.array([2.0, 1.0]), "instruction": "open"}
    first, second = (policy.infer(observation)["actions"] for _ in range(2))
    assert (first != second).all()
    policy.reset()
    assert np.array_equal(policy.infer(observation)["actions"], first)
    noise = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    assert np.array_equal(policy.infer(observation | {"noise": noise})["actions"], first)
    assert np.array_equal(policy.infer(observation)["actions"], second)  # given noise is not drawn


def placed(*images: np.ndarray) -> float:
    """What PARALLEL makes of the pictures: the sums of their halves, each times its place."""
    halves = np.stack(images).reshape(4, 24).sum(1)
    return float((halves * [1, 2, 3, 4]).sum()) / 1000


def test_parallel_and_continuous_with_two_cameras(write: Callable[..., Path]) -> None:
    policy = load(write("parallel"))
    observation = {"image.top": picture(0), "image.wrist": picture(1), "state": np.array([2.0, 3.5])}
    seen = placed(picture(0), picture(1))
    expected = (np.array([[2, 3], [0, 0]]) + seen) * [0.1, 0.5] + [0, 0.5]
    np.testing.assert_allclose(policy.infer(observation)["actions"], expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"found no image\.wrist"):
        policy.infer({"image.top": picture(0), "state": np.array([2.0, 3.5])})


def test_cameras_of_different_sizes_go_one_by_one(write: Callable[..., Path]) -> None:
    """VISION takes any picture of 48 numbers; here one of 4 x 4 and one of 2 x 8 pixels."""
    wide = replace(CONTINUOUS, cameras=(camera("top"), replace(camera("wrist"), height=2, width=8)))
    vision = replace(VISION, inputs={"pixels": ("float32", ("height", "width", 3))})
    path = write("parallel", wide, (vision, PARALLEL))
    policy = load(path)
    observation = {"image.top": picture(0), "image.wrist": picture(1).reshape(2, 8, 3), "state": np.array([1.0, 2.0])}
    seen = placed(picture(0), picture(1))
    np.testing.assert_allclose(
        policy.infer(observation)["actions"][0], np.array([0.1, 0.5]) * seen + [0, 0.5], rtol=1e-6
    )
    with pytest.raises(UserError, match=r"\('height', 'width', 3\)\} .* found .*\(4, 4, 3\)"):
        LocalPolicy(replace_policy(path, wide, (VISION.spec(), PARALLEL.spec())))


def replace_policy(path: Path, spec: PolicySpec, graphs: tuple[GraphSpec, ...]) -> artifacts.Artifact:
    manifest = artifacts.load(path).manifest
    return artifacts.Artifact(path, replace(manifest, policy=spec, graphs=graphs), "")


def changed(graph: Graph, **tensors: Any) -> GraphSpec:
    """Declared with other shapes (after the batch dimension); None: without that tensor."""

    def change(declared: Tensors) -> Tensors:
        found = {
            name: tensor for name, tensor in declared.items() if tensors.get(name.replace(".", "_"), 0) is not None
        }
        return {name: (kind, tensors.get(name.replace(".", "_"), shape)) for name, (kind, shape) in found.items()}

    return replace(graph, inputs=change(graph.inputs), outputs=change(graph.outputs)).spec()


@pytest.mark.parametrize(
    ("kind", "graphs", "message"),
    [
        ("autoregressive", (VISION, PREFIX), "expected the graphs vision and decoder in .*, found vision, prefix;"),
        ("flow", (VISION, DECODER), "expected the graphs vision, prefix and step in .*, found vision, decoder;"),
        ("autoregressive", (VISION, changed(DECODER, logits=(5,))), r"'logits': \(6,\).* found .*'logits': \(5,\)"),
        ("autoregressive", (VISION, changed(DECODER, ids=(7,))), r"'ids': \('length',\).* found .*'ids': \(7,\)"),
        ("autoregressive", (VISION, changed(DECODER, image_tokens=(2, 1))), r"'image_tokens': \('image_tokens', 1\)"),
        ("autoregressive", (VISION, changed(DECODER, image_tokens=("seen", 2))), r"found .*\('seen', 2\)"),
        ("autoregressive", (VISION, changed(DECODER, present_0_value=None)), r"'present\.0\.value': .* found"),
        ("autoregressive", (VISION, changed(DECODER, past_0_key=(2, "past", 1))), r"found .*\(2, 'past', 1\)"),
        ("autoregressive", (VISION, changed(DECODER, past_0_key=(1, 3, 1))), r"found .*\(1, 3, 1\)"),
        # A camera may be missing.
        (
            "flow",
            (VISION, changed(PREFIX, image_tokens=(4, 1)), STEP),
            r"'image_tokens': \('image_tokens', 1\).* found",
        ),
        ("flow", (VISION, PREFIX, changed(STEP, key_0=None)), r"'key\.0': \(1, 'length', 1\).* found"),
        ("flow", (VISION, PREFIX, changed(STEP, state=None)), r"'state': \(4,\).* found"),
        ("flow", (VISION, PREFIX, changed(STEP, state=(2,))), r"'state': \(4,\).* found .*'state': \(2,\)"),
        ("flow", (VISION, PREFIX, changed(STEP, x=(2, 4))), r"'x': \(2, 3\).* found .*'x': \(2, 4\)"),
        ("flow", (VISION, PREFIX, changed(STEP, t=None)), r"'t': \(\).* found"),
        ("parallel", (VISION, changed(PARALLEL, image_tokens=(2, 1))), r"'image_tokens': \(4, 1\).* found"),
        ("parallel", (VISION, changed(PARALLEL, actions=(2, 3))), r"'actions': \(2, 2\).* found"),
        ("parallel", (changed(VISION, pixels=(4, 4, 6)), PARALLEL), r"'pixels': \(4, 4, 3\).* found"),
    ],
)
def test_refuses_graphs_that_do_not_fit(
    write: Callable[..., Path], kind: str, graphs: tuple[Any, ...], message: str
) -> None:
    specs = tuple(graph.spec() if isinstance(graph, Graph) else graph for graph in graphs)
    with pytest.raises(UserError, match=message) as caught:
        LocalPolicy(replace_policy(write(kind), KIND[kind][0], specs))
    assert "\n" not in str(caught.value)


def test_later_passes_have_no_image_tokens(write: Callable[..., Path]) -> None:
    """So that their number must be dynamic, even where no camera may be missing."""
    spec = replace(AUTOREGRESSIVE, cameras=(camera("top"), camera("wrist")))
    load(write("autoregressive", spec))
    with pytest.raises(UserError, match=r"'image_tokens': \('image_tokens', 1\).* found .*'image_tokens': \(4, 1\)"):
        LocalPolicy(replace_policy(write("flow"), spec, (VISION.spec(), changed(DECODER, image_tokens=(4, 1)))))


def test_a_dynamic_dimension_fits_any_number(write: Callable[..., Path]) -> None:
    decoder = replace(PARALLEL, inputs=PARALLEL.inputs | {"image_tokens": ("float32", ("any", 1))})
    load(write("parallel", graphs=(VISION, decoder)))


def golden(kind: str, policy: LocalPolicy, path: Path, number: int = 3) -> dict[str, Any]:
    """What ``policy`` says to a few observations, as golden.npz."""
    spec, random = policy.spec, np.random.default_rng(5)
    arrays: dict[str, Any] = {
        f"image.{c.name}": np.stack([picture(10 * i + k) for k in range(number)]) for i, c in enumerate(spec.cameras)
    }
    if spec.state is not None:
        arrays["state"] = random.standard_normal((number, 2)).astype(np.float32)
    if spec.prompt is not None:
        arrays["instructions"] = np.array(["open", "close drawer", "the window drawer"][:number])
        # "the" before and 6 (window) behind each.
        arrays["ids"] = np.array([[4, 2, 6, -1, -1], [4, 3, 5, 6, -1], [4, 4, 6, 5, 6]][:number])
    if spec.flow is not None:
        arrays["noise"] = random.standard_normal((number, 2, 3)).astype(np.float32)
    answers = []
    for i in range(number):
        names = {"instructions": "instruction"}
        observation: dict[str, Any] = {
            names.get(name, name): array[i] for name, array in arrays.items() if name != "ids"
        }
        if "instruction" in observation:
            observation["instruction"] = str(observation["instruction"])
        answers.append(policy.infer(observation))
    arrays["actions"] = np.stack([answer["actions"] for answer in answers])
    if spec.action.bins:
        tokens = np.array([answer["tokens"] for answer in answers])
        arrays |= {"tokens": tokens, "logits": np.eye(6, dtype=np.float32)[tokens - 10]}
    return arrays


@pytest.mark.parametrize("kind", ["autoregressive", "flow", "parallel"])
def test_verification_of_every_kind(write: Callable[..., Path], kind: str, tmp_path: Path) -> None:
    policy = load(write(kind))
    arrays = golden(kind, policy, tmp_path)
    np.savez(tmp_path / "golden.npz", **arrays)
    read = verify.read_golden(tmp_path / "golden.npz", policy.spec)
    tolerance = verify.default_tolerances(policy.spec.action).tolerance
    record = verify.measure(policy, read, verify.Tolerances(tolerance))
    assert record.max_error == (0, 0)
    assert (record.tokens, record.observations) == (12 if kind == "autoregressive" else 0, 3)
    assert verify.failure_reason(record) is None
    if kind == "autoregressive":
        return
    # Half of a 256th of the narrower range, 2 * 0.1 m.
    assert tolerance == pytest.approx(0.1 / 256)
    arrays["actions"][2, 1, 0] += np.float32(1.1 * tolerance)
    np.savez(tmp_path / "golden.npz", **arrays)
    record = verify.measure(
        policy, verify.read_golden(tmp_path / "golden.npz", policy.spec), verify.Tolerances(tolerance)
    )
    np.testing.assert_allclose(record.max_error, [1.1 * tolerance, 0], atol=1e-6)
    assert record.chunk_jitter == pytest.approx(1.1 * tolerance, abs=1e-6)
    assert verify.failure_reason(record)


def test_what_follows_a_flip_at_a_tie_is_no_error(write: Callable[..., Path], tmp_path: Path) -> None:
    policy = load(write("autoregressive"))
    arrays = golden("autoregressive", policy, tmp_path)
    tokens, logits = arrays["tokens"], arrays["logits"]
    # The reference says something else from the second token of the first chunk on, and hesitated there.
    other = 11 if tokens[0, 0, 1] != 11 else 12
    logits[0, 0, 1, other - 10] = logits[0, 0, 1, tokens[0, 0, 1] - 10] + 1e-4
    tokens[0, 0, 1] = other
    for step in ((1, 0), (1, 1)):
        tokens[0][step] = 10 + (tokens[0][step] - 10 + 2) % 6
        logits[0][step] = np.eye(6)[tokens[0][step] - 10]
    arrays["actions"] = tokens_to_actions(tokens, policy.spec.action)
    np.savez(tmp_path / "golden.npz", **arrays)
    record = verify.measure(policy, verify.read_golden(tmp_path / "golden.npz", policy.spec), verify.Tolerances(1e-3))
    assert record.token_flips == 3
    assert record.max_error == (0, 0)
    # Without the tie the first flip counts, and all the others do.
    logits[0, 0, 1, other - 10] += 1
    np.savez(tmp_path / "golden.npz", **arrays)
    record = verify.measure(policy, verify.read_golden(tmp_path / "golden.npz", policy.spec), verify.Tolerances(1e-3))
    assert verify.failure_reason(record)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("flow", {"noise": None}, "to hold .*noise.* found"),
        ("flow", {"noise": np.zeros((3, 2, 2), np.float32)}, r"expected noise of shape \(3, 2, 3\)"),
        ("flow", {"tokens": np.zeros((3, 2, 2), np.int64)}, "found .*tokens"),
        ("flow", {"actions": np.full((3, 2, 2), np.nan, np.float32)}, "expected finite actions"),
        ("flow", {"image.top": None}, "to hold"),
        ("parallel", {"instructions": np.array(["a", "b", "c"])}, "found .*instructions"),
        ("autoregressive", {"logits": np.zeros((3, 2, 2, 5), np.float32)}, r"logits of shape \(3, 2, 2, 6\)"),
        ("autoregressive", {"ids": np.zeros(3, np.int64)}, r"expected ids of shape \(3, any\)"),
    ],
)
def test_goldens_that_do_not_fit(
    write: Callable[..., Path], kind: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    policy = load(write(kind))
    arrays: dict[str, Any] = golden(kind, policy, tmp_path) | change
    np.savez(tmp_path / "golden.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message):
        verify.read_golden(tmp_path / "golden.npz", policy.spec)


def test_a_golden_may_lack_an_optional_camera(write: Callable[..., Path], tmp_path: Path) -> None:
    policy = load(write("flow"))
    arrays = golden("flow", policy, tmp_path)
    del arrays["image.wrist"]
    np.savez(tmp_path / "golden.npz", **arrays)
    read = verify.read_golden(tmp_path / "golden.npz", policy.spec)
    assert "image.wrist" not in read.observation(0, policy.spec)
    assert max(verify.measure(policy, read, verify.Tolerances(1.0)).max_error) > 0  # answers to both cameras
