"""Graphs whose decoder blocks run on llama.cpp; ONNX Runtime runs the rest.

"decoder" has three parts: "embed" computes the sequence of vectors, llama.cpp the blocks, "head" the outputs from the
last hidden states. Keys and values of autoregressive decoding stay in llama.cpp, so this decoder's graph has no past.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from numpy.typing import NDArray

from rlrc.artifact import Artifact, GraphSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.backends.llama_model import ENGINE, LlamaModel, library
from rlrc.runtime.inference.backends.onnxruntime import OnnxRuntime, check_needs
from rlrc.runtime.inference.decode import NoAction

NAME = "gguf"


class LlamaCpp:
    """The backend's graphs on ``threads`` threads. ``onnx``: the engine of those that llama.cpp does not run."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        library()  # raises before the other graphs are loaded
        graphs = {graph.name: graph for graph in artifact.manifest.graphs if graph.backend == NAME}
        spec, decoder, width = artifact.manifest.policy, graphs["decoder"], artifact.manifest.towers["decoder"].width
        check_needs(decoder, ENGINE, metadata.version(ENGINE))
        self._rows, causal = _rows(graphs["head"], width), spec.decode == "autoregressive"
        self.onnx: Engine = OnnxRuntime(artifact, threads, NAME)
        self._model = LlamaModel(artifact.file(decoder.file), width, decoder.precision, causal, threads)
        # Autoregressive decoding feeds back all tokens but the last.
        self._later = spec.action.horizon * spec.action.dim - 1 if causal else 0

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name: see rlrc.runtime.inference.backends.engine.Engine. Raises NoAction if an engine fails."""
        if graph != "decoder":
            return self.onnx.run(graph, inputs)
        start = int(inputs["start"][0]) if "start" in inputs else 0
        if start not in (0, self._model.length):
            raise NoAction(f"expected a pass from position 0 or {self._model.length}, found one from {start}")
        batch = self.onnx.run("embed", inputs)["x"]
        if len(batch) != 1:
            raise NoAction(f"expected one observation at a time on {ENGINE}, found {len(batch)}")
        (x,) = batch
        if start == 0:
            self._model.begin(len(x) + self._later)
        return self.onnx.run("head", {"hidden": self._model.run(x, self._rows)[None]})

    def versions(self) -> dict[str, str]:
        """Versions that a measurement on this engine depends on."""
        return {ENGINE: metadata.version(ENGINE), **self.onnx.versions()}


def _rows(head: GraphSpec, width: int) -> int:
    """How many hidden states the head takes."""
    shapes = {tensor.name: tensor.shape for tensor in head.inputs}
    rows = shapes["hidden"][1] if len(shapes.get("hidden", ())) == 3 else None
    if not isinstance(rows, int) or shapes != {"hidden": (shapes["hidden"][0], rows, width)}:
        raise UserError(f'expected graph "head" to take hidden (1, rows, {width}), found {shapes}; export it again')
    return rows
