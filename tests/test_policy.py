"""LocalPolicy against the same policy in numpy, and everything it refuses to load or to answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import Manifest
from rlrc.errors import UserError
from rlrc.runtime.inference import decode
from rlrc.runtime.inference.policy import LocalPolicy

MakeToy = Callable[..., Path]


def answers(policy: LocalPolicy, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and actions for the observations of golden.npz."""
    golden = np.load(path / "golden.npz")
    results = [
        policy.infer({"image.corner4": image, "state": state, "instruction": str(instruction)})
        for image, state, instruction in zip(
            golden["image.corner4"], golden["state"], golden["instructions"], strict=True
        )
    ]
    return np.stack([result["tokens"] for result in results]), np.stack([result["actions"] for result in results])


def test_infer_is_the_policy_computed_in_numpy(toy_artifact: Path) -> None:
    # The golden instructions alternate, so a stale cache of token ids would show.
    golden = np.load(toy_artifact / "golden.npz")
    assert golden["tokens"].std() > 4  # answers that differ, or agreement would say little
    tokens, actions = answers(LocalPolicy.load(toy_artifact), toy_artifact)
    assert tokens.dtype == np.int64
    assert actions.dtype == np.float32
    assert np.array_equal(tokens, golden["tokens"])
    np.testing.assert_allclose(actions, golden["actions"], rtol=1e-6)


def test_instruction_and_state_matter(toy_artifact: Path, observation: dict[str, Any]) -> None:
    policy = LocalPolicy.load(toy_artifact)
    first = policy.infer(observation)["tokens"]
    assert (policy.infer(observation | {"instruction": "close the window"})["tokens"] != first).any()
    assert (policy.infer(observation | {"state": -observation["state"]})["tokens"] != first).any()
    assert np.array_equal(policy.infer(observation)["tokens"], first)


def test_timing_covers_the_inference(toy_artifact: Path, observation: dict[str, Any]) -> None:
    policy = LocalPolicy.load(toy_artifact)
    policy.reset()
    covered = []
    for _ in range(20):
        started = perf_counter()
        timing: Any = policy.infer(observation)["timing"]
        wall = (perf_counter() - started) * 1e3
        assert list(timing) == ["preprocess_ms", "vision_ms", "decoder_ms", "postprocess_ms"]
        assert min(timing.values()) > 0
        assert sum(timing.values()) < wall
        covered.append(sum(timing.values()) / wall)
    assert max(covered) > 0.8  # the best: between two clocks this process may lose the core


def test_broken_weights_give_an_error_and_no_action(
    make_toy: MakeToy, toy: Any, tmp_path: Path, observation: dict[str, Any]
) -> None:
    broken = replace(toy, embedding=np.full_like(toy.embedding, np.nan))
    policy = LocalPolicy.load(make_toy(tmp_path / "broken", weights=broken))
    with pytest.raises(decode.NoAction, match="expected finite logits"):
        policy.infer(observation)


def test_an_engine_that_fails_gives_no_action(
    make_toy: MakeToy, toy: Any, tmp_path: Path, observation: dict[str, Any]
) -> None:
    few_words = replace(toy, embedding=toy.embedding[:3])  # the tokenizer knows more of them
    policy = LocalPolicy.load(make_toy(tmp_path / "few", weights=few_words))
    with pytest.raises(decode.NoAction, match='graph "decoder" failed: '):
        policy.infer(observation)


def test_infer_refuses_an_observation_that_does_not_fit(toy_artifact: Path, observation: dict[str, Any]) -> None:
    policy = LocalPolicy.load(toy_artifact)
    with pytest.raises(UserError, match="found nan in x"):
        policy.infer(observation | {"state": np.full(3, np.nan)})
    with pytest.raises(UserError, match="at most 5 tokens"):
        policy.infer(observation | {"instruction": "open the drawer " * 3})


def test_refuses_an_artifact_without_graphs(make_toy: MakeToy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected onnxruntime graphs in .*, found none; run rlrc export"):
        LocalPolicy.load(make_toy(tmp_path / "bare", graphs=()))


def test_refuses_an_artifact_that_was_not_verified(make_toy: MakeToy, tmp_path: Path) -> None:
    path = make_toy(tmp_path / "unverified", verified=())
    with pytest.raises(UserError, match=r"expected one verification record .*, found 0; run rlrc export"):
        LocalPolicy.load(path)
    assert LocalPolicy.load(path, require_verified=False).spec.family == "tiny"


def test_refuses_an_artifact_that_failed_verification(make_toy: MakeToy, toy_artifact: Path, tmp_path: Path) -> None:
    record = artifacts.load(toy_artifact).manifest.verified[0]
    failed = replace(record, max_error=(0.0, 0.0, 0.0007, 0.0))
    with pytest.raises(UserError, match=r"found an error of 0.0007 in action units where 0.000625 is tolerated"):
        LocalPolicy.load(make_toy(tmp_path / "failed", verified=(failed,)))


def test_refuses_another_engines_record(make_toy: MakeToy, toy_artifact: Path, tmp_path: Path) -> None:
    record = artifacts.load(toy_artifact).manifest.verified[0]
    with pytest.raises(UserError, match="found 0; run rlrc export"):
        LocalPolicy.load(make_toy(tmp_path / "other", verified=(replace(record, backend="tensorrt"),)))


@pytest.mark.parametrize("file", ["graphs/onnx/decoder.onnx", "graphs/onnx/vision.onnx", "tokenizer/tokenizer.json"])
def test_refuses_a_damaged_file(own_toy: Path, file: str) -> None:
    damaged = bytearray((own_toy / file).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (own_toy / file).write_bytes(damaged)
    with pytest.raises(UserError, match="expected sha256"):
        LocalPolicy.load(own_toy)


def test_loads_without_reading_what_it_does_not_need(own_toy: Path) -> None:
    damaged = bytearray((own_toy / "golden.npz").read_bytes())
    damaged[-1] ^= 1
    (own_toy / "golden.npz").write_bytes(damaged)
    LocalPolicy.load(own_toy)  # verify reads it, a robot need not


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("decoder", {"needs": {"onnxruntime": ">=99.1"}}, r"expected onnxruntime >=99.1, found \d"),
        ("decoder", {"needs": {"cuda": ">=12"}}, 'found cuda ">=12"; upgrade rlrc'),
        ("decoder", {"file": "graphs/onnx/vision.onnx"}, "to have the inputs image_tokens .* found pixels float32"),
        ("decoder", {"name": "head"}, "expected the graphs vision and decoder in .*, found vision, head;"),
        ("vision", {"file": "tokenizer/tokenizer.json"}, "expected a graph that onnxruntime .* loads, found"),
        ("decoder", {"outputs": ()}, 'expected graph "decoder" .* after the batch dimension'),
    ],
)
def test_refuses_a_graph_that_is_not_what_the_manifest_says(
    make_toy: MakeToy, toy_artifact: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    graphs = artifacts.load(toy_artifact).manifest.graphs
    path = make_toy(tmp_path / "liar", graphs=tuple(replace(g, **change) if g.name == name else g for g in graphs))
    with pytest.raises(UserError, match=message) as caught:
        LocalPolicy.load(path)
    assert "\n" not in str(caught.value)


def test_refuses_graphs_of_another_policy(make_toy: MakeToy, tiny_manifest: Manifest, tmp_path: Path) -> None:
    spec = tiny_manifest.policy
    longer = replace(spec, action=replace(spec.action, horizon=4))
    with pytest.raises(UserError, match=r"'logits': \(4, 4, 32\).* found .*'logits': \(3, 4, 32\)"):
        LocalPolicy.load(make_toy(tmp_path / "longer", policy=longer))
    with pytest.raises(UserError, match=r'expected graph "decoder" .* found .*state'):
        LocalPolicy.load(make_toy(tmp_path / "numb", policy=replace(spec, state=None)))


def test_refuses_a_file_whose_shape_differs_from_both_descriptions(
    make_toy: MakeToy, tiny_manifest: Manifest, toy_artifact: Path, tmp_path: Path
) -> None:
    spec = tiny_manifest.policy
    longer = replace(spec, action=replace(spec.action, horizon=4))
    path = make_toy(tmp_path / "longer", spec=longer)
    LocalPolicy.load(path)
    truth = artifacts.load(path)
    shutil.copy(toy_artifact / "graphs/onnx/decoder.onnx", path / "graphs/onnx/decoder.onnx")
    with pytest.raises(
        UserError, match=r"outputs logits float32 \(\?, 4, 4, 32\) .* found logits float32 \(\?, 3, 4, 32\)"
    ):
        LocalPolicy(truth)


def test_refuses_no_threads(toy_artifact: Path) -> None:
    with pytest.raises(UserError, match="expected at least one thread, found 0"):
        LocalPolicy.load(toy_artifact, threads=0)
