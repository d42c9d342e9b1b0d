"""Keys and values that ONNX Runtime keeps between passes, in place or longer every time, against attention in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from rlrc.artifact import GraphSpec, TensorSpec  # noqa: E402
from rlrc.runtime.inference.backends.onnxruntime_cache import ROOM, Cache  # noqa: E402
from rlrc.runtime.inference.decode import NoAction  # noqa: E402

HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE


def in_place() -> tuple[list[Any], dict[str, np.ndarray], str]:
    nodes = [
        helper.make_node("Shape", ["qkv"], ["batch"], start=0, end=1),
        helper.make_node("Shape", ["qkv"], ["length"], start=1, end=2),
        helper.make_node("Add", ["start", "length"], ["end"]),
        helper.make_node("Cast", ["end"], ["total"], to=TensorProto.INT32),
        helper.make_node("Sub", ["total", "one"], ["position"]),
        helper.make_node("Expand", ["position", "batch"], ["last"]),
        helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", "past.0.key", "past.0.value", "last", "total"],
            ["mixed", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=HEADS,
        ),
    ]
    return nodes, {"one": np.array([1], np.int32)}, "capacity"


def longer() -> tuple[list[Any], dict[str, np.ndarray], str]:
    nodes = [helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3)]
    for part in "qkv":
        nodes.append(helper.make_node("Reshape", [part, "heads"], [f"{part}4"]))
        nodes.append(helper.make_node("Transpose", [f"{part}4"], [f"{part}t"], perm=[0, 2, 1, 3]))
    nodes += [
        helper.make_node("Concat", ["past.0.key", "kt"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past.0.value", "vt"], ["present.0.value"], axis=2),
        helper.make_node("Transpose", ["present.0.key"], ["keys"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["qt", "keys"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "present.0.value"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["back"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["back", "flat"], ["mixed"]),
    ]
    constants = {
        "heads": np.array([0, 0, HEADS, SIZE]),
        "flat": np.array([0, 0, WIDTH]),
        "scale": np.array(SIZE**-0.5, np.float32),
    }
    return nodes, constants, "present"


def cache(kind: Any, folder: Path) -> Cache:
    nodes, constants, present = kind()
    past = "capacity" if present == "capacity" else "past"
    pasts = [TensorSpec(f"past.0.{part}", "float32", ("batch", HEADS, past, SIZE)) for part in ("key", "value")]
    presents = [
        TensorSpec(f"present.0.{part}", "float32", ("batch", HEADS, present, SIZE)) for part in ("key", "value")
    ]
    inputs = [TensorSpec("qkv", "float32", ("batch", "length", 3 * WIDTH)), *pasts]
    if kind is in_place:
        inputs.append(TensorSpec("start", "int64", (1,)))
    outputs = [TensorSpec("mixed", "float32", ("batch", "length", WIDTH)), *presents]

    def declared(tensors: list[TensorSpec]) -> list[Any]:
        kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        return [helper.make_tensor_value_info(tensor.name, kinds[tensor.dtype], tensor.shape) for tensor in tensors]

    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "decoder", declared(inputs), declared(outputs), stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "decoder.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    return Cache(session, GraphSpec("decoder", "onnxruntime", "", "fp32", tuple(inputs), tuple(outputs), {}))


def last_row(qkv: np.ndarray) -> np.ndarray:
    """Attention of the last of the rows (T, 3 * width) to all of them, in float64 -> (width,)."""
    q, k, v = (part.reshape(-1, HEADS, SIZE).astype(np.float64) for part in np.split(qkv, 3, -1))
    scores = np.einsum("hd,thd->ht", q[-1], k) * SIZE**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v).reshape(-1)


def passed(kept: Cache, rows: np.ndarray, start: int, end: int) -> np.ndarray:
    outputs = kept.run({"qkv": rows[None, start:end], "start": np.array([start]), "end": np.array([end])})
    assert list(outputs) == ["mixed"]
    return outputs["mixed"][0, -1]


@pytest.mark.parametrize("kind", [in_place, longer])
def test_every_pass_sees_those_before_it(kind: Any, tmp_path: Path) -> None:
    kept, random = cache(kind, tmp_path), np.random.default_rng(0)
    ends = [ROOM - 9, *range(ROOM - 8, 2 * ROOM + 3)]  # beyond the first buffers' positions, and again
    for _ in range(2):  # a second sequence finds nothing of the first
        rows = random.standard_normal((ends[-1], 3 * WIDTH)).astype(np.float32)
        for start, end in zip([0, *ends], ends, strict=False):
            np.testing.assert_allclose(passed(kept, rows, start, end), last_row(rows[:end]), atol=1e-5)


@pytest.mark.parametrize("kind", [in_place, longer])
def test_observations_of_a_batch_have_their_own_pasts(kind: Any, tmp_path: Path) -> None:
    kept, rows = cache(kind, tmp_path), np.random.default_rng(0).standard_normal((3, 9, 3 * WIDTH)).astype(np.float32)

    def mixed(batch: int, start: int, end: int) -> np.ndarray:
        inputs = {"qkv": rows[:batch, start:end], "start": np.array([start]), "end": np.array([end])}
        return kept.run(inputs)["mixed"][:, -1]

    for batch in (1, 3, 2):
        for start, end in ((0, 5), (5, 6), (6, 7)):
            expected = np.stack([last_row(rows[i, :end]) for i in range(batch)])
            np.testing.assert_allclose(mixed(batch, start, end), expected, atol=1e-5)
    with pytest.raises(NoAction, match="expected 2 observations, as in the pass before, found 3"):
        mixed(3, 7, 8)


@pytest.mark.parametrize("kind", [in_place, longer])
def test_a_pass_that_does_not_follow_is_refused(kind: Any, tmp_path: Path) -> None:
    kept, rows = cache(kind, tmp_path), np.zeros((9, 3 * WIDTH), np.float32)
    with pytest.raises(NoAction, match="expected a pass from position 0 or 0, found one from 2"):
        passed(kept, rows, 2, 3)
    passed(kept, rows, 0, 5)
    with pytest.raises(NoAction, match="expected a pass from position 0 or 5, found one from 4"):
        passed(kept, rows, 4, 5)
    passed(kept, rows, 5, 6)
    with pytest.raises(Exception, match="qkv"):
        kept.run({"start": np.array([6]), "end": np.array([7])})
    with pytest.raises(NoAction, match="position 0 or 0, found one from 6"):  # a pass failed: start anew
        passed(kept, rows, 6, 7)
