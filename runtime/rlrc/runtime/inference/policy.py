"""The policy interface: ``infer`` and ``reset``. LocalPolicy runs an artifact's graphs on this machine.

The observation format, here and everywhere in rlrc, is a dict of

- ``image.<camera>``: uint8 (H, W, 3) RGB, for every camera of the policy; optional ones may be missing, but not all;
- ``state``: floats (S,) in raw units, if the policy has a state;
- ``instruction``: a non-empty string, if the policy has a prompt (ignored otherwise);
- ``noise``: optional, float (horizon, width), of flow policies only; drawn if missing.

``preprocess.check`` enforces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from rlrc import artifact as artifacts
from rlrc.artifact import TOKENIZER, Artifact, VerifiedSpec
from rlrc.errors import UserError
from rlrc.runtime.inference import backends, decode, preprocess, recheck
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.continuation import Continuation
from rlrc.runtime.inference.interfaces import check_interface
from rlrc.runtime.inference.verify import failure_reason


class InferenceTiming(TypedDict):
    """Milliseconds of one inference. Checks count as preprocessing, all graphs but "vision" as decoder."""

    preprocess_ms: float
    vision_ms: float
    decoder_ms: float
    postprocess_ms: float


class Result(TypedDict):
    """One chunk: ``actions`` float32 (horizon, dim) un-normalised, ``tokens`` int64 (horizon, dim) or None.

    Tokens are bins, or ids of the vocabulary; policies of continuous actions have none.
    """

    actions: NDArray[np.float32]
    tokens: NDArray[np.int64] | None
    timing: InferenceTiming


class Policy(Protocol):
    def infer(self, observation: Mapping[str, Any]) -> Result:
        """Raises UserError for an observation that does not fit, NoAction if the result is not a valid action."""
        ...

    def reset(self) -> None:
        """Starts a new episode."""
        ...


class LocalPolicy:
    """An artifact's graphs of one backend (by default the preferred one), on its engine or a given one.

    A flow policy draws noise from its own generator, which ``reset`` seeds again: episodes are reproducible, and the
    chunks of one episode have different noise.
    """

    def __init__(
        self, artifact: Artifact, threads: int = 1, backend: str | None = None, engine: Engine | None = None
    ) -> None:
        if threads < 1:
            raise UserError(f"expected at least one thread, found {threads}; give --threads 1 or more")
        self.artifact, self.spec = artifact, artifact.manifest.policy
        self.backend = backends.choose(artifact.manifest, backend, artifact.path)
        graphs = {graph.name: graph for graph in artifact.manifest.graphs if graph.backend == self.backend}
        check_interface(artifact, graphs)
        prompt = self.spec.prompt
        self._tokenizer = None if prompt is None else preprocess.Tokenizer(artifact.file(TOKENIZER), prompt)
        self.engine = engine or backends.open_engine(artifact, self.backend, threads)
        self.reset()

    @staticmethod
    def load(
        path: Path | str, threads: int = 1, require_verified: bool = True, backend: str | None = None
    ) -> LocalPolicy:
        """Loads an artifact and checks the hashes of the files that it reads.

        On other kernels than those of the verification record, it verifies the graphs again
        (rlrc.runtime.inference.recheck). Raises UserError for an artifact without verified graphs.
        """
        artifact = artifacts.load(Path(path), verify=())
        backend = backends.choose(artifact.manifest, backend, artifact.path)
        artifact.verify(*runtime_folders(backend))
        if not require_verified:
            return LocalPolicy(artifact, threads, backend)
        record = find_record(artifact, backend)
        if reason := failure_reason(record):
            raise UserError(f"expected verified graphs in {path}, found {reason}; run rlrc export")
        policy = LocalPolicy(artifact, threads, backend)
        recheck.check(policy, record)
        return policy

    def infer(self, observation: Mapping[str, Any], continuation: Continuation | None = None) -> Result:
        """``continuation``: the actions that the chunk continues (rlrc.runtime.inference.continuation)."""
        if continuation is not None:
            continuation.check(self.spec.action)
        return self._infer([observation], continuation)[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[Result]:
        """A chunk per observation, from one batched pass of every graph; ``timing`` is of the whole batch.

        Raises UserError as ``infer``, and unless all observations have the same cameras and prompts of the same length;
        NoAction from engines that take one observation at a time. Precisions that scale all activations of a layer
        together (int8) round an observation differently in a batch than alone.
        """
        return self._infer(observations, None)

    def _infer(self, observations: Sequence[Mapping[str, Any]], continuation: Continuation | None) -> list[Result]:
        started = perf_counter()
        for observation in observations:
            preprocess.check(observation, self.spec)
        prepared = [preprocess.prepare(observation, self.spec, self._tokenizer) for observation in observations]
        inputs = _batch(prepared)
        ready = perf_counter()
        inputs["image_tokens"] = self._encode_images([each.pixels for each in prepared])
        encoded = perf_counter()
        graphs_s = 0.0

        def run(graph: str, tensors: decode.Tensors) -> decode.Tensors:
            nonlocal graphs_s
            begun = perf_counter()
            outputs = self.engine.run(graph, tensors)
            graphs_s += perf_counter() - begun
            return outputs

        decoded = self._decode(run, inputs, observations, continuation)
        finished = perf_counter()
        timing = InferenceTiming(
            preprocess_ms=(ready - started) * 1e3,
            vision_ms=(encoded - ready) * 1e3,
            decoder_ms=graphs_s * 1e3,
            postprocess_ms=(finished - encoded - graphs_s) * 1e3,
        )
        tokens = [None] * len(prepared) if decoded.tokens is None else decoded.tokens
        return [
            Result(actions=own, tokens=ids, timing=timing) for own, ids in zip(decoded.actions, tokens, strict=True)
        ]

    def reset(self) -> None:
        """Seeds the noise generator again. There is no other state between chunks."""
        self._noise = np.random.default_rng(0)

    def ids(self, observation: Mapping[str, Any]) -> NDArray[np.int64] | None:
        """The token ids (L,) of an observation's prompt; None if the policy has no prompt."""
        preprocess.check(observation, self.spec)
        return preprocess.prepare(observation, self.spec, self._tokenizer).ids

    def _encode_images(self, pictures: list[list[NDArray[np.float32]]]) -> NDArray[np.float32]:
        """The pictures of every observation -> image tokens (B, N, width), one camera after the other.

        One batch for all pictures if they have the same size, else one per camera.
        """
        cameras = list(zip(*pictures, strict=True))
        if len({picture.shape for camera in cameras for picture in camera}) == 1:
            cameras = [tuple(picture for own in pictures for picture in own)]
        outputs = [self.engine.run("vision", {"pixels": _stack(camera)})["image_tokens"] for camera in cameras]
        tokens = [each.reshape(len(pictures), -1, each.shape[-1]) for each in outputs]
        return tokens[0] if len(tokens) == 1 else np.concatenate(tokens, 1)

    def _decode(
        self,
        run: decode.Run,
        inputs: dict[str, NDArray[Any]],
        observations: Sequence[Mapping[str, Any]],
        continuation: Continuation | None,
    ) -> decode.Decoded:
        action, flow = self.spec.action, self.spec.flow
        if flow is not None:
            noise = np.stack(
                [self._draw_noise(observation, (action.horizon, flow.width)) for observation in observations]
            )
            return decode.flow(run, inputs, action, flow, noise, continuation)
        if self.spec.decode == "autoregressive":
            return decode.autoregressive(run, inputs, action, continuation)
        return decode.parallel(run, inputs, action, continuation)

    def _draw_noise(self, observation: Mapping[str, Any], shape: tuple[int, int]) -> NDArray[np.float32]:
        given = observation.get("noise")
        return self._noise.standard_normal(shape, np.float32) if given is None else np.asarray(given, np.float32)


def _batch(prepared: Sequence[preprocess.ModelInputs]) -> dict[str, NDArray[Any]]:
    """``ids`` and ``state`` as batches. Raises UserError if the observations cannot be batched."""
    kinds = {(len(each.pixels), None if each.ids is None else len(each.ids)) for each in prepared}
    if len(kinds) != 1:
        found = ", ".join(f"{cameras} and {ids}" for cameras, ids in sorted(kinds)) or "none"
        raise UserError(
            f"expected as many cameras and prompt tokens in all observations, found {found}; infer them one by one"
        )
    inputs: dict[str, NDArray[Any]] = {}
    for name in ("ids", "state"):
        values = [getattr(each, name) for each in prepared]
        if values[0] is not None:
            inputs[name] = _stack(values)
    return inputs


def _stack(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Stacks arrays; a single one is not copied."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def runtime_folders(backend: str) -> tuple[str, ...]:
    """The artifact's folders that a robot reads. The weights are not read, so they are not hashed."""
    return backends.FOLDERS[backend], "tokenizer"


def find_record(artifact: Artifact, backend: str) -> VerifiedSpec:
    """The verification record of the backend's graphs. Raises UserError if there is none."""
    records = [record for record in artifact.manifest.verified if record.backend == backend]
    if len(records) != 1:
        raise UserError(
            f"expected one verification record of the {backend} graphs of {artifact.path}, "
            f"found {len(records)}; run rlrc export"
        )
    return records[0]
