"""The graphs of an artifact on ONNX Runtime's CPU provider.

Sessions are created from a path, so that ONNX Runtime memory-maps external data. I/O binding is used only for keys and
values: for a 96 px picture it would save 1 us per graph.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # absolute: the engine, not this module
from numpy.typing import NDArray

from rlrc.artifact import Artifact, GraphSpec, TensorSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.backends.kernels import kernels
from rlrc.runtime.inference.backends.onnxruntime_cache import PAST, Cache
from rlrc.runtime.inference.decode import NoAction

NAME = "onnxruntime"
SPIN_US, BOUNDS_SPINNING = "10", (1, 26)  # older releases cannot limit the spinning time
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32"}


class OnnxRuntime:
    """One session per graph of the backend, except those that llama.cpp runs."""

    def __init__(self, artifact: Artifact, threads: int, backend: str = NAME) -> None:
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._inputs: dict[str, list[str]] = {}
        self._outputs: dict[str, list[str]] = {}
        self._caches: dict[str, Cache] = {}
        for graph in artifact.manifest.graphs:
            if graph.backend != backend or graph.file.endswith(".gguf"):
                continue
            if graph.name in self._sessions:
                raise UserError(
                    f'expected one {backend} graph "{graph.name}" in {artifact.path}, found two; export it again'
                )
            self._sessions[graph.name] = self._open(artifact.path / graph.file, graph, threads)
            self._inputs[graph.name] = [tensor.name for tensor in graph.inputs]
            self._outputs[graph.name] = [tensor.name for tensor in graph.outputs]
            if any(tensor.name.startswith(PAST) for tensor in graph.inputs):
                self._caches[graph.name] = Cache(self._sessions[graph.name], graph)
        _trim_memory()

    def _open(self, path: Path, graph: GraphSpec, threads: int) -> onnxruntime.InferenceSession:
        return _session(path, graph, threads)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name: see rlrc.runtime.inference.backends.engine.Engine.

        Raises NoAction if the engine fails, on an unknown token id for instance.
        """
        names = self._outputs[graph]
        try:
            if graph in self._caches:
                return self._caches[graph].run(inputs)
            outputs = self._sessions[graph].run(names, {name: inputs[name] for name in self._inputs[graph]})
        except NoAction:
            raise
        except Exception as error:  # the engine's exceptions share no base class
            raise NoAction(f'graph "{graph}" failed: {" ".join(str(error).split())}') from error
        return dict(zip(names, outputs, strict=True))

    def versions(self) -> dict[str, str]:
        """Versions that a measurement on this engine depends on."""
        versions = {NAME: onnxruntime.__version__, "numpy": np.__version__, "machine": platform.machine()}
        return versions | {"kernels": kernels()}


def _session(path: Path, graph: GraphSpec, threads: int) -> onnxruntime.InferenceSession:
    check_needs(graph, NAME, onnxruntime.__version__)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors
    # Spinning between the operators of a pass saves a sixth of the time per token. 10 us are as good as a millisecond,
    # which starves the control loop if there are as many threads as cores (measured on two busy cores). With as many
    # threads as cores, releases that cannot limit it do not spin. Threads stop spinning after a pass.
    spins = threads < _cores() or _numbers(onnxruntime.__version__) >= BOUNDS_SPINNING
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the engine's exceptions share no base class
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected a graph that {NAME} {onnxruntime.__version__} loads, found {path}: {reason}; export it again"
        ) from None
    for kind, declared, actual in (
        ("input", graph.inputs, session.get_inputs()),
        ("output", graph.outputs, session.get_outputs()),
    ):
        _check_interface(path, kind, declared, actual)
    return session


def _trim_memory() -> None:
    """Returns memory that loading used temporarily, for unpacking weights for instance (glibc only).

    For a decoder of 154 M parameters in w4a8, 218 MB instead of 6.3 GB stay resident.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_interface(path: Path, kind: str, declared: tuple[TensorSpec, ...], actual: list[Any]) -> None:
    """Raises UserError unless the graph has the names, types and shapes that the manifest declares."""
    expected = {tensor.name: (tensor.dtype, tuple(_size(size) for size in tensor.shape)) for tensor in declared}
    found = {
        node.name: (_DTYPES.get(node.type, node.type), tuple(_size(size) for size in node.shape)) for node in actual
    }
    if expected != found:
        raise UserError(
            f"expected {path} to have the {kind}s {_describe(expected)} that its manifest declares, "
            f"found {_describe(found)}; export the artifact again"
        )


def _size(size: int | str | None) -> int | str:
    return size if isinstance(size, int) else "?"


def _describe(tensors: dict[str, tuple[str, tuple[int | str, ...]]]) -> str:
    return (
        ", ".join(f"{name} {dtype} ({', '.join(map(str, shape))})" for name, (dtype, shape) in tensors.items())
        or "none"
    )


def check_needs(graph: GraphSpec, engine: str, found: str) -> None:
    """Raises UserError unless this version of the engine satisfies the graph's needs."""
    for need, version in graph.needs.items():
        needed = re.fullmatch(r">=(\d+(?:\.\d+)*)", version)
        if need != engine or needed is None:
            raise UserError(
                f'expected graph "{graph.name}" to need {engine} ">=VERSION" only, found {need} "{version}"; '
                "upgrade rlrc or export the artifact again"
            )
        if _numbers(found) < _numbers(needed[1]):
            raise UserError(
                f'graph "{graph.name}" expected {engine} {version}, found {found}; '
                f"upgrade {engine} or export the artifact again"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The version 1.23.2 -> (1, 23, 2); a suffix such as ".dev1" is left out."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
