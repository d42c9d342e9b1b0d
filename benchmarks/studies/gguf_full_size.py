"""Export an OpenVLA of real size to llama.cpp as a stream and run it, without an official checkpoint.

    python benchmarks/studies/gguf_full_size.py FOLDER [--threads 2] [--only dense]

The policies have random weights in OpenVLA-7B's geometry: one dense in bfloat16, exported in fp16; one without 90 % of
the decoder, at 4 bits per weight. Prints bytes, seconds, milliseconds of each part of an action, and peak anonymous
memory (mapped files are reclaimable page cache). FOLDER temporarily needs 32 GB; the script empties it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlrc import artifact as artifacts
from rlrc.artifact import WEIGHTS, Artifact, LayerSpec, Manifest, PolicySpec, QuantizationSpec, TowerSpec
from rlrc.compressor.checkpoints import geometry, reader
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.storage.tensor_files import write_file
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.exporters.gguf import target
from rlrc.runtime.inference import decode
from rlrc.runtime.inference.backends import open_engine

WORDS = 20
PRUNED = LayerSpec(4, 4, 128, 1664)  # about a tenth of a block; the first and last blocks are not pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["dense", "pruned"])
    arguments = parser.parse_args()
    folder, options = geometry.folder("openvla-7b")
    layout = reader.layout(folder, options)
    dense = layout.towers["decoder"]
    pruned = replace(dense, layers=(dense.layers[0], *[PRUNED] * (len(dense.layers) - 2), dense.layers[-1]))
    for kind, decoder, precision in (("dense", dense, "fp16"), ("pruned", pruned, "int4")):
        if arguments.only in (None, kind):
            towers = {**layout.towers, "decoder": decoder}
            try:
                parent = random_artifact(arguments.folder / kind, layout.spec, towers, precision == "int4")
                report = export(parent, arguments.folder / f"{kind}-gguf", precision)
                shutil.rmtree(parent.path)
                report |= run(artifacts.load(arguments.folder / f"{kind}-gguf", ()), arguments.threads)
                print(json.dumps({"policy": kind, "precision": precision, "threads": arguments.threads, **report}))
            finally:
                for path in (arguments.folder / kind, arguments.folder / f"{kind}-gguf"):
                    shutil.rmtree(path, ignore_errors=True)


# Random weights


def random_artifact(out: Path, spec: PolicySpec, towers: dict[str, TowerSpec], quantized: bool) -> Artifact:
    policy = build_on_meta(spec, towers)
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    bits = {name: 4 for name, shape in shapes.items() if quantized and len(shape) == 2 and fits(name, shape)}
    quantization = QuantizationSpec("int4", 32, bits) if quantized else None
    parameters = sum(map(prod, shapes.values()))
    with artifacts.create_artifact(out) as draft:
        noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
        metas = stored(shapes, bits)
        made = Tensors("random weights", metas, lambda name: values(name, metas[name], noise))
        write_file(draft.file(WEIGHTS), made, list(made))
        draft.finish(Manifest(spec, towers, parameters, "int4" if quantized else "bfloat16", quantization))
    return artifacts.load(out, ())


def fits(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and name != "embedding.weight" and shape[1] % 32 == 0


def stored(shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The tensors of an artifact's weights: quantized ones as integers with their scales."""
    found = dict[str, torch.Tensor]()
    make = partial(torch.empty, device="meta")
    for name, shape in shapes.items():
        if name in bits:
            found[f"{name}.q"] = make(shape[0], shape[1] // 2, dtype=torch.uint8)
            found[f"{name}.scale"] = make(shape[0], shape[1] // 32, dtype=torch.float16)
        else:
            found[name] = make(*shape, dtype=torch.bfloat16)
    return found


def values(name: str, meta: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Random norm scales near one, and weights that preserve the magnitude of their input."""
    shape, dtype = tuple(meta.shape), meta.dtype
    if name.endswith(".scale"):
        return torch.full(shape, (4.6 * (shape[1] * 32) ** 0.5) ** -1, dtype=dtype)
    repeated = noise.repeat(-(-prod(shape) // len(noise)))[: prod(shape)].view(shape)
    if dtype == torch.uint8:
        return (repeated * 1e4).to(torch.int32).to(torch.uint8)
    return (1 + 0.1 * repeated if len(shape) == 1 else repeated / shape[-1] ** 0.5).to(dtype)


# Measurements


@contextmanager
def peak() -> Iterator[dict[str, Any]]:
    """Measure peak anonymous memory (GB) and seconds; the values are complete on exit."""
    measured: dict[str, Any] = {"peak_gb": 0.0}
    done, started = threading.Event(), perf_counter()

    def sample() -> None:
        while not done.is_set():
            measured["peak_gb"] = max(measured["peak_gb"], anonymous())
            sleep(0.02)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield measured
    finally:
        done.set()
        sampler.join()
        measured["seconds"] = round(perf_counter() - started, 1)


def anonymous() -> float:
    """Anonymous memory of this process in GB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return round(int(line.split()[1]) * 1024 / 1e9, 2)


def export(parent: Artifact, out: Path, precision: str) -> dict[str, Any]:
    """Export the graphs only: policies with random weights have no golden observations."""
    before = anonymous()
    with artifacts.create_artifact(out) as draft:
        with peak() as usage:
            graphs = target.write_graphs(draft, parent, precision)
        draft.finish(replace(parent.manifest, graphs=graphs, files={}))
    files = artifacts.load(out, ()).manifest.files
    return {
        "parameters": parent.manifest.parameters,
        "bytes": {name: file.size for name, file in files.items()},
        "before_gb": before,
        "export": usage,
    }


def run(artifact: Artifact, threads: int) -> dict[str, Any]:
    """Compute two actions from noise; the first also reads the files from disk."""
    spec, random = artifact.manifest.policy, np.random.default_rng(0)
    camera = spec.cameras[0]
    pixels = random.standard_normal((1, camera.height, camera.width, len(camera.mean))).astype(np.float32)
    with peak() as load_usage:
        engine = open_engine(artifact, "gguf", threads)
    actions = []
    with peak() as run_usage:
        for _ in range(2):
            timing: dict[str, list[float]] = {"vision": [], "decoder": []}

            def run_graph(
                graph: str, inputs: Mapping[str, NDArray[Any]], timing: dict[str, list[float]] = timing
            ) -> dict[str, NDArray[Any]]:
                started = perf_counter()
                outputs = engine.run(graph, inputs)
                timing[graph].append((perf_counter() - started) * 1e3)
                return outputs

            image_tokens = run_graph("vision", {"pixels": pixels})["image_tokens"]
            ids = random.integers(3, 30000, (1, WORDS))
            decoded = decode.autoregressive(run_graph, {"image_tokens": image_tokens, "ids": ids}, spec.action)
            assert np.isfinite(decoded.actions).all()
            first, *later = timing["decoder"]
            parts = {"vision": timing["vision"][0], "prefill": first, "steps": sum(later)}
            actions.append({name: round(ms) for name, ms in (parts | {"action": sum(parts.values())}).items()})
    return {"load": load_usage, "run": run_usage, "ms": actions}


if __name__ == "__main__":
    main()
