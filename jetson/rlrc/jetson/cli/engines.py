"""The commands build and check."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Positional

from rlrc.jetson.board import check as checking
from rlrc.jetson.board.build import build
from rlrc.progress import progress
from rlrc.runtime.inference.backends.engine_cache import engine_cache
from rlrc.tables import plain_console


@dataclass(frozen=True)
class BuildEngines:
    """Build the TensorRT engines of an artifact's graphs on this device, unless they are in the cache."""

    path: Positional[Path]
    """the artifact, exported with --to tensorrt"""
    engine_cache: Path | None = None
    """folder of engines (default: the one that the runtime reads, $RLRC_ENGINE_CACHE or rlrc/engines in the user's
    cache)"""
    json: bool = False
    """print the result as JSON"""

    def run(self) -> int:
        with progress("building, %", 100) as report:

            def watch(graph: str, phase: str, done: float) -> None:
                report(round(100 * done), f"{graph}: {phase}")

            engines = list(build(self.path, self.engine_cache or engine_cache(), watch))
        if self.json:
            rows = [asdict(engine) | {"file": str(engine.file)} for engine in engines]
            print(json.dumps({"engines": rows}, indent=1))
            return 0
        for engine in engines:
            state = "kept" if engine.cached else "built"
            plain_console().print(f"{engine.graph}: {state}, {engine.bytes:,} bytes, {engine.file}", soft_wrap=True)
        return 0


@dataclass(frozen=True)
class CheckGraphs:
    """Check without a GPU that NVIDIA's parser and builder accept an artifact's TensorRT graphs; exit code 1 if not.

    Needs TensorRT-RTX (the extra tensorrt-check) in its own environment. Checks neither speed nor answers.
    """

    path: Positional[Path]
    """the artifact, exported with --to tensorrt"""
    sm: int = 86
    """the compute capability to build for; 86 is the nearest to Orin's 87"""
    json: bool = False
    """print the result as JSON"""

    def run(self) -> int:
        results = checking.check(self.path, self.sm)
        failures = [result for result in results if result.failure]
        if self.json:
            print(json.dumps({"sm": self.sm, "graphs": [asdict(result) for result in results]}, indent=1))
        else:
            for result in results:
                found = result.failure or f"parsed and built, {result.engine_bytes:,} bytes"
                plain_console().print(f"{result.graph}: {found}", soft_wrap=True)
        for result in failures:
            print(f"rlrc: check failed: {result.graph}: {result.failure}", file=sys.stderr)
        return 1 if failures else 0
