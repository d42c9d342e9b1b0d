"""The engines that run an artifact's graphs, and which of an artifact's sets of graphs is run.

An artifact has up to one set of graphs for every backend, each in a folder of its own. Engines are imported when they
are opened: that takes time, and a robot has only those that it needs.
"""

from __future__ import annotations

from typing import Literal

from rlrc.artifact import Artifact, Manifest
from rlrc.errors import UserError
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.backends.nvidia import runs_tensorrt

Backend = Literal["onnxruntime", "tensorrt", "gguf"]
FOLDERS = {"onnxruntime": "graphs/onnx", "tensorrt": "graphs/tensorrt", "gguf": "graphs/gguf"}
TARGETS = {"onnxruntime": "onnx", "tensorrt": "tensorrt", "gguf": "gguf"}
"""What `rlrc export --to` calls the set of graphs that a backend runs."""


def list_backends(manifest: Manifest) -> list[str]:
    """The backends that the artifact has graphs for, in the order in which they are preferred.

    TensorRT comes first where there are a GPU and TensorRT, else last.
    """
    found = [backend for backend in FOLDERS if any(graph.backend == backend for graph in manifest.graphs)]
    if "tensorrt" in found:
        found.remove("tensorrt")
        found.insert(0 if runs_tensorrt() else len(found), "tensorrt")
    return found


def list_runnable(manifest: Manifest) -> list[str]:
    """Those of ``list_backends`` that this machine can run, given their engines."""
    return [backend for backend in list_backends(manifest) if backend != "tensorrt" or runs_tensorrt()]


def choose(manifest: Manifest, asked: str | None = None, where: object = "the artifact") -> str:
    """The backend asked for, or the first of ``list_backends``. Raises UserError without any."""
    found = list_backends(manifest)
    if asked is None and found:
        return found[0]
    if asked is None or asked not in found:
        target = TARGETS.get(asked or "onnxruntime")
        if target is None:
            raise UserError(f"expected a backend of {', '.join(FOLDERS)}, found {asked}; choose one of those")
        raise UserError(
            f"expected {asked or 'onnxruntime'} graphs in {where}, found {', '.join(found) or 'none'}; "
            f"run rlrc export {where} OUT{'' if target == 'onnx' else f' --to {target}'}"
        )
    return asked


def open_engine(artifact: Artifact, backend: str, threads: int) -> Engine:
    """Raises UserError for graphs that the engine does not take."""
    if backend == "onnxruntime":
        from rlrc.runtime.inference.backends.onnxruntime import OnnxRuntime

        return OnnxRuntime(artifact, threads)
    if backend == "gguf":
        from rlrc.runtime.inference.backends.llama_cpp import LlamaCpp

        return LlamaCpp(artifact, threads)
    from rlrc.runtime.inference.backends.tensorrt import TensorRT

    return TensorRT(artifact)
