"""The policy seam: ``infer`` and ``reset``. LocalPolicy runs an artifact's graphs on this machine.

An observation is a dict of ``image.<camera>`` uint8 (H, W, 3), ``state`` floats (S,) in raw units and the string
``instruction``, as far as the policy has cameras, a state and a prompt. Optional cameras may be missing, all but one. A
flow policy also takes ``noise`` float (horizon, width); left out, it is drawn.
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
from rlrc.runtime import backends, decode, preprocess
from rlrc.runtime.backends import Engine
from rlrc.runtime.continuation import Continuation
from rlrc.runtime.interfaces import check_interface
from rlrc.runtime.verify import failure

TOKENIZER = "tokenizer/tokenizer.json"


class Timing(TypedDict):
    """Milliseconds of one inference. The checks count as preprocessing, all graphs but "vision" as decoder."""

    preprocess_ms: float
    vision_ms: float
    decoder_ms: float
    postprocess_ms: float


class Result(TypedDict):
    """One chunk: ``actions`` float32 (horizon, dim) un-normalised, ``tokens`` int64 (horizon, dim) or None.

    Tokens are bins, or ids of the vocabulary that holds them; a policy of continuous actions has none.
    """

    actions: NDArray[np.float32]
    tokens: NDArray[np.int64] | None
    timing: Timing


class Policy(Protocol):
    def infer(self, observation: Mapping[str, Any]) -> Result:
        """Raises UserError for an observation that does not fit and NoAction where no sound action comes out."""
        ...

    def reset(self) -> None:
        """Forget the episode so far."""
        ...


class LocalPolicy:
    """An artifact's graphs of one backend (by default the first there is), on its engine or a given one.

    A flow policy draws its noise from a generator of its own, which ``reset`` starts anew: an episode can be repeated
    exactly, and the chunks of one episode differ in their noise.
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
        """Checks the hashes of all that is read here. Refuses an artifact without verified graphs (UserError)."""
        artifact = artifacts.load(Path(path), verify=())
        backend = backends.choose(artifact.manifest, backend, artifact.path)
        artifact.verify(*loaded(backend))
        if require_verified and (reason := failure(recorded(artifact, backend))):
            raise UserError(f"expected verified graphs in {path}, found {reason}; run rlrc export")
        return LocalPolicy(artifact, threads, backend)

    def infer(self, observation: Mapping[str, Any], continuation: Continuation | None = None) -> Result:
        """``continuation``: what the chunk has to go on from (rlrc.runtime.continuation)."""
        started = perf_counter()
        if continuation is not None:
            continuation.check(self.spec.action)
        preprocess.check(observation, self.spec)
        prepared = preprocess.prepare(observation, self.spec, self._tokenizer)
        inputs: dict[str, NDArray[Any]] = {}
        if prepared.ids is not None:
            inputs["ids"] = prepared.ids[None]
        if prepared.state is not None:
            inputs["state"] = prepared.state[None]
        ready = perf_counter()
        inputs["image_tokens"] = self._see(prepared.pixels)
        seen = perf_counter()
        graphs_s = 0.0

        def run(graph: str, tensors: decode.Tensors) -> decode.Tensors:
            nonlocal graphs_s
            begun = perf_counter()
            outputs = self.engine.run(graph, tensors)
            graphs_s += perf_counter() - begun
            return outputs

        decoded = self._decode(run, inputs, observation, continuation)
        finished = perf_counter()
        timing = Timing(
            preprocess_ms=(ready - started) * 1e3,
            vision_ms=(seen - ready) * 1e3,
            decoder_ms=graphs_s * 1e3,
            postprocess_ms=(finished - seen - graphs_s) * 1e3,
        )
        tokens = None if decoded.tokens is None else decoded.tokens[0]
        return Result(actions=decoded.actions[0], tokens=tokens, timing=timing)

    def reset(self) -> None:
        """Starts the generator of the noise anew. Nothing else outlives a chunk."""
        self._noise = np.random.default_rng(0)

    def ids(self, observation: Mapping[str, Any]) -> NDArray[np.int64] | None:
        """The token ids (L,) that the policy makes of an observation, None if it takes no prompt."""
        preprocess.check(observation, self.spec)
        return preprocess.prepare(observation, self.spec, self._tokenizer).ids

    def _see(self, pixels: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """-> image tokens (1, N, width) of all cameras, one after the other; those of one size go in together."""
        together = len(pixels) > 1 and len({picture.shape for picture in pixels}) == 1
        batches = [np.stack(pixels)] if together else [picture[None] for picture in pixels]
        seen = [self.engine.run("vision", {"pixels": batch})["image_tokens"] for batch in batches]
        tokens = [batch.reshape(1, -1, batch.shape[-1]) for batch in seen]
        return tokens[0] if len(tokens) == 1 else np.concatenate(tokens, 1)

    def _decode(
        self,
        run: decode.Run,
        inputs: dict[str, NDArray[Any]],
        observation: Mapping[str, Any],
        continuation: Continuation | None,
    ) -> decode.Decoded:
        action, flow = self.spec.action, self.spec.flow
        if flow is not None:
            noise = observation.get("noise")
            if noise is None:
                noise = self._noise.standard_normal((action.horizon, flow.width), np.float32)
            return decode.flow(run, inputs, action, flow, np.asarray(noise, np.float32)[None], continuation)
        if self.spec.decode == "autoregressive":
            return decode.autoregressive(run, inputs, action, continuation)
        return decode.parallel(run, inputs, action, continuation)


def loaded(backend: str) -> tuple[str, ...]:
    """What a robot reads; the weights stay unread and so unhashed."""
    return backends.FOLDERS[backend], "tokenizer"


def recorded(artifact: Artifact, backend: str) -> VerifiedSpec:
    """The record that the backend's graphs agree with the torch policy. Raises UserError if there is none."""
    records = [record for record in artifact.manifest.verified if record.backend == backend]
    if len(records) != 1:
        raise UserError(
            f"expected one record that the {backend} graphs of {artifact.path} agree with the policy, "
            f"found {len(records)}; run rlrc export"
        )
    return records[0]
