"""The policy seam: ``infer`` and ``reset``. LocalPolicy runs an artifact's graphs on this machine.

An observation is a dict of ``image.<camera>`` uint8 (H, W, 3), ``state`` floats (S,) in raw units and the string
``instruction``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from rlrc import artifact as artifacts
from rlrc.artifact import Artifact, VerifiedSpec
from rlrc.errors import UserError
from rlrc.runtime import decode, preprocess
from rlrc.runtime.verify import failure

BACKEND = "onnxruntime"
TOKENIZER = "tokenizer/tokenizer.json"
LOADED = ("graphs/onnx", "tokenizer")  # what a robot reads; the weights stay unread and so unhashed


class Timing(TypedDict):
    """Milliseconds of one inference. The checks count as preprocessing."""

    preprocess_ms: float
    vision_ms: float
    decoder_ms: float
    postprocess_ms: float


class Result(TypedDict):
    """One chunk: ``actions`` float32 (horizon, dim) un-normalised, ``tokens`` int64 (horizon, dim)."""

    actions: NDArray[np.float32]
    tokens: NDArray[np.int64]
    timing: Timing


class Policy(Protocol):
    def infer(self, observation: Mapping[str, Any]) -> Result:
        """Raises UserError for an observation that does not fit and NoAction where no sound action comes out."""
        ...

    def reset(self) -> None:
        """Forget the episode so far."""
        ...


class LocalPolicy:
    """An artifact's graphs on ONNX Runtime with ``threads`` threads."""

    def __init__(self, artifact: Artifact, threads: int = 1) -> None:
        from rlrc.runtime.backends.onnxruntime import OnnxRuntime  # imported late: an engine takes time to import

        if threads < 1:
            raise UserError(f"expected at least one thread, found {threads}; give --threads 1 or more")
        self.artifact, self.spec = artifact, artifact.manifest.policy
        _check_interface(artifact)
        self._tokenizer = preprocess.Tokenizer(artifact.file(TOKENIZER), self.spec.prompt)
        self._graphs = OnnxRuntime(artifact, threads)
        self._instruction: tuple[str, NDArray[np.int64]] | None = None

    @staticmethod
    def load(path: Path | str, threads: int = 1, require_verified: bool = True) -> LocalPolicy:
        """Checks the hashes of all that is read here. Refuses an artifact without verified graphs (UserError)."""
        artifact = artifacts.load(Path(path), verify=LOADED)
        if require_verified and (reason := failure(recorded(artifact))):
            raise UserError(f"expected verified graphs in {path}, found {reason}; run rlrc export")
        return LocalPolicy(artifact, threads)

    def infer(self, observation: Mapping[str, Any]) -> Result:
        started = perf_counter()
        preprocess.check(observation, self.spec)
        pixels, inputs = self._prepare(observation)
        prepared = perf_counter()
        inputs |= self._graphs.run("vision", {"pixels": pixels})
        seen = perf_counter()
        decoder_s = 0.0

        def run(tensors: decode.Tensors) -> decode.Tensors:
            nonlocal decoder_s
            begun = perf_counter()
            outputs = self._graphs.run("decoder", tensors)
            decoder_s += perf_counter() - begun
            return outputs

        decoded = decode.parallel(run, inputs, self.spec.action)
        finished = perf_counter()
        timing = Timing(
            preprocess_ms=(prepared - started) * 1e3,
            vision_ms=(seen - prepared) * 1e3,
            decoder_ms=decoder_s * 1e3,
            postprocess_ms=(finished - seen - decoder_s) * 1e3,
        )
        return Result(actions=decoded.actions[0], tokens=decoded.tokens[0], timing=timing)

    def reset(self) -> None:
        """Nothing to forget: every chunk depends on its observation alone."""

    def _prepare(self, observation: Mapping[str, Any]) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """-> pixels (1, H, W, 3) and the decoder's other inputs, each with a batch of one."""
        (camera,) = self.spec.cameras
        inputs: dict[str, NDArray[Any]] = {"ids": self.ids(observation["instruction"])[None]}
        if self.spec.state is not None:
            inputs["state"] = preprocess.normalise(observation["state"], self.spec.state.norm)[None]
        return preprocess.pictures(observation[f"image.{camera.name}"], camera)[None], inputs

    def ids(self, instruction: str) -> NDArray[np.int64]:
        """Token ids (max_tokens,). The last instruction's are kept, which saves 10 us and more."""
        if self._instruction is None or self._instruction[0] != instruction:
            self._instruction = (instruction, self._tokenizer(instruction))
        return self._instruction[1]


def recorded(artifact: Artifact) -> VerifiedSpec:
    """The record that the graphs agree with the torch policy. Raises UserError if there are no graphs or no record."""
    _check_graphs(artifact)
    records = [record for record in artifact.manifest.verified if record.backend == BACKEND]
    if len(records) != 1:
        raise UserError(
            f"expected one record that the {BACKEND} graphs of {artifact.path} agree with the policy, "
            f"found {len(records)}; run rlrc export"
        )
    return records[0]


def _check_graphs(artifact: Artifact) -> None:
    if not any(graph.backend == BACKEND for graph in artifact.manifest.graphs):
        raise UserError(
            f"expected {BACKEND} graphs in {artifact.path}, found none; run rlrc export {artifact.path} OUT"
        )


def _check_interface(artifact: Artifact) -> None:
    """The graphs' declared shapes must be those that the policy's own description implies."""
    spec = artifact.manifest.policy
    if spec.decode != "parallel" or len(spec.cameras) != 1 or not spec.action.bins:
        raise UserError(
            f"expected a policy with one camera and parallel decoding over bins, found {len(spec.cameras)} cameras, "
            f"{spec.decode} decoding and {spec.action.bins} bins in {artifact.path}; this version of rlrc runs no other"
        )
    _check_graphs(artifact)
    graphs = {graph.name: graph for graph in artifact.manifest.graphs if graph.backend == BACKEND}
    if graphs.keys() != {"vision", "decoder"}:
        raise UserError(
            f"expected the graphs vision and decoder in {artifact.path}, found {', '.join(graphs)}; "
            "export the artifact again"
        )
    (camera,), action = spec.cameras, spec.action
    size = (camera.height, camera.width)
    seen = {tensor.name: tensor.shape[1:] for tensor in graphs["vision"].outputs}  # their number is the family's affair
    expected: dict[str, dict[str, tuple[int | str, ...]]] = {
        "vision": seen | {"pixels": (*size, 3) if camera.layout == "HWC" else (3, *size)},
        "decoder": seen | {"ids": (spec.prompt.max_tokens,), "logits": (action.horizon, action.dim, action.bins)},
    }
    if spec.state is not None:
        expected["decoder"]["state"] = (len(spec.state.names),)
    for name, tensors in expected.items():
        declared = {tensor.name: tensor.shape[1:] for tensor in (*graphs[name].inputs, *graphs[name].outputs)}
        if declared != tensors:
            raise UserError(
                f'expected graph "{name}" of {artifact.path} with {tensors} after the batch dimension, '
                f"as its policy is described, found {declared}; export the artifact again"
            )
