"""OpenVLA at its real size on llama.cpp: written as a stream and run, without anybody's checkpoint.

    python benchmarks/studies/gguf_full_size.py FOLDER [--threads 2] [--only dense]

Random weights of OpenVLA-7B's geometry: dense in bfloat16, exported in fp16, and with 90 % of the decoder cut away and
4 bits a weight. Prints bytes, seconds, milliseconds of each part of an action, and the peak of anonymous memory: mapped
files are page cache, which the kernel takes back. FOLDER needs 32 GB for a while and is left empty.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
from rlrc.exporters.gguf import target
from rlrc.runtime.inference import decode
from rlrc.runtime.inference.backends import open_engine

WORDS = 20
PRUNED = LayerSpec(4, 4, 128, 1664)  # a tenth of a block, a little more so that the first and the last stay whole
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["dense", "pruned"])
    arguments = parser.parse_args()
    folder, options = geometry.folder("openvla-7b")
    layout = reader.layout(folder, options)
    whole = layout.towers["decoder"]
    cut = replace(whole, layers=(whole.layers[0], *[PRUNED] * (len(whole.layers) - 2), whole.layers[-1]))
    for kind, decoder, precision in (("dense", whole, "fp16"), ("pruned", cut, "int4")):
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
        write_safetensors(draft.file(WEIGHTS), shapes, bits)
        draft.finish(Manifest(spec, towers, parameters, "int4" if quantized else "bfloat16", quantization))
    return artifacts.load(out, ())


def fits(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and name != "embedding.weight" and shape[1] % 32 == 0


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], bits: Mapping[str, int]) -> None:
    """The header, then one tensor after the other."""
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in shapes.items():
        if name in bits:
            stored[f"{name}.q"] = (shape[0], shape[1] // 2), torch.uint8
            stored[f"{name}.scale"] = (shape[0], shape[1] // 32), torch.float16
        else:
            stored[name] = shape, torch.bfloat16
    header, offset = dict[str, Any](), 0
    for name, (shape, dtype) in stored.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in stored.items():
            values(name, shape, dtype, noise).contiguous().view(torch.uint8).numpy().tofile(file)


def values(name: str, shape: tuple[int, ...], dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """Norms near one, weights that keep the size of what they are given."""
    if name.endswith(".scale"):
        return torch.full(shape, (4.6 * (shape[1] * 32) ** 0.5) ** -1, dtype=dtype)
    repeated = noise.repeat(-(-prod(shape) // len(noise)))[: prod(shape)].view(shape)
    if dtype == torch.uint8:
        return (repeated * 1e4).to(torch.int32).to(torch.uint8)
    return (1 + 0.1 * repeated if len(shape) == 1 else repeated / shape[-1] ** 0.5).to(dtype)


# What is measured


@contextmanager
def peak() -> Iterator[dict[str, Any]]:
    """Fills in the largest anonymous memory (GB) and the seconds."""
    found: dict[str, Any] = {"peak_gb": 0.0}
    done, started = threading.Event(), perf_counter()

    def watch() -> None:
        while not done.is_set():
            found["peak_gb"] = max(found["peak_gb"], anonymous())
            sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found["seconds"] = round(perf_counter() - started, 1)


def anonymous() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return round(int(line.split()[1]) * 1024 / 1e9, 2)


def export(parent: Artifact, out: Path, precision: str) -> dict[str, Any]:
    """The graphs alone: there are no golden observations of random weights."""
    before = anonymous()
    with artifacts.create_artifact(out) as draft:
        with peak() as exported:
            graphs = target.write_graphs(draft, parent, precision)
        draft.finish(replace(parent.manifest, graphs=graphs, files={}))
    files = artifacts.load(out, ()).manifest.files
    return {
        "parameters": parent.manifest.parameters,
        "bytes": {name: file.size for name, file in files.items()},
        "before_gb": before,
        "export": exported,
    }


def run(artifact: Artifact, threads: int) -> dict[str, Any]:
    """Two actions from noise: the first one reads the files."""
    spec, random = artifact.manifest.policy, np.random.default_rng(0)
    camera = spec.cameras[0]
    pixels = random.standard_normal((1, camera.height, camera.width, len(camera.mean))).astype(np.float32)
    with peak() as loaded:
        engine = open_engine(artifact, "gguf", threads)
    actions = []
    with peak() as ran:
        for _ in range(2):
            timing: dict[str, list[float]] = {"vision": [], "decoder": []}

            def timed(
                graph: str, inputs: Mapping[str, NDArray[Any]], timing: dict[str, list[float]] = timing
            ) -> dict[str, NDArray[Any]]:
                started = perf_counter()
                outputs = engine.run(graph, inputs)
                timing[graph].append((perf_counter() - started) * 1e3)
                return outputs

            seen = timed("vision", {"pixels": pixels})["image_tokens"]
            ids = random.integers(3, 30000, (1, WORDS))
            decoded = decode.autoregressive(timed, {"image_tokens": seen, "ids": ids}, spec.action)
            assert np.isfinite(decoded.actions).all()
            first, *later = timing["decoder"]
            parts = {"vision": timing["vision"][0], "prefill": first, "steps": sum(later)}
            actions.append({name: round(ms) for name, ms in (parts | {"action": sum(parts.values())}).items()})
    return {"load": loaded, "run": ran, "ms": actions}


if __name__ == "__main__":
    main()
