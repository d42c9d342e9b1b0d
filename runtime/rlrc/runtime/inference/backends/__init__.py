"""The engines that run an artifact's graphs, and the choice among them.

An artifact has at most one set of graphs per backend, each in its own folder. An engine is imported when it is opened:
imports take time, and a robot installs only the engines that it needs.
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
"""The names of the backends' graphs in `rlrc export --to`."""


def list_backends(manifest: Manifest) -> list[str]:
    """The backends that the artifact has graphs for, preferred ones first.

    TensorRT comes first on machines with a GPU and TensorRT, else last.
    """
    found = [backend for backend in FOLDERS if any(graph.backend == backend for graph in manifest.graphs)]
    if "tensorrt" in found:
        found.remove("tensorrt")
        found.insert(0 if runs_tensorrt() else len(found), "tensorrt")
    return found


def list_runnable(manifest: Manifest) -> list[str]:
    """Those of ``list_backends`` that this machine can run if their engines are installed."""
    return [backend for backend in list_backends(manifest) if backend != "tensorrt" or runs_tensorrt()]


def choose(manifest: Manifest, requested: str | None = None, where: object = "the artifact") -> str:
    """The requested backend, or the first of ``list_backends``. Raises UserError without graphs for it."""
    found = list_backends(manifest)
    if requested is None and found:
        return found[0]
    if requested is None or requested not in found:
        target = TARGETS.get(requested or "onnxruntime")
        if target is None:
            raise UserError(f"expected a backend of {', '.join(FOLDERS)}, found {requested}; choose one of those")
        raise UserError(
            f"expected {requested or 'onnxruntime'} graphs in {where}, found {', '.join(found) or 'none'}; "
            f"run rlrc export {where} OUT{'' if target == 'onnx' else f' --to {target}'}"
        )
    return requested


def open_engine(artifact: Artifact, backend: str, threads: int) -> Engine:
    """Loads the graphs. Raises UserError for graphs that the engine rejects."""
    if backend == "onnxruntime":
        from rlrc.runtime.inference.backends.onnxruntime import OnnxRuntime

        return OnnxRuntime(artifact, threads)
    if backend == "gguf":
        from rlrc.runtime.inference.backends.llama_cpp import LlamaCpp

        return LlamaCpp(artifact, threads)
    from rlrc.runtime.inference.backends.tensorrt import TensorRT

    return TensorRT(artifact)
