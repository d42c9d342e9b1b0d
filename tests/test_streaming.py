"""Loading a folder of full size: never two copies of the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from rlrc.compressor.checkpoints import geometry
from rlrc.compressor.models.tensors import Tensors


def write_folder(path: Path, name: str, shards: int) -> int:
    """The official folder of a geometry with random weights in bfloat16, written in pieces. Returns their number."""
    folder, _ = geometry.folder(name)
    path.mkdir()
    for file, values in {**folder.virtual, "config.json": folder.config}.items():
        if isinstance(values, Tensors):
            save_file({tensor: values.read(tensor) for tensor in values}, path / file)
        else:
            (path / file).write_text(json.dumps(values))
    shapes = {tensor: folder.tensors.shape(tensor) for tensor in folder.tensors}
    index, random = {}, np.random.default_rng(0)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        index |= dict.fromkeys(names := list(shapes)[shard::shards], file)
        write_random(path / file, {tensor: shapes[tensor] for tensor in names}, random)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(map(prod, shapes.values()))


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    """A safetensors file: the length of the header, the header, the data. Values are of 0.5 to 2, of either sign."""
    header, position = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (position, position + 2 * prod(shape))}
        position += 2 * prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for done in range(0, prod(shape), 1 << 20):
                values = random.integers(0, 1 << 16, min(1 << 20, prod(shape) - done), np.uint16)
                # bfloat16: the sign, an exponent of 126 or 127, seven bits of mantissa
                stream.write((values & 0x80FF | 0x3F00).tobytes())


LOAD = """
import sys, torch
from pathlib import Path
from rlrc.compressor.checkpoints.folder import open_folder
from rlrc.compressor.checkpoints.reader import read
dtype = getattr(torch, sys.argv[2]) if sys.argv[2] else None
policy, _ = read(open_folder(Path(sys.argv[1])), dtype=dtype)
state = policy.state_dict()
assert all(tensor.abs().min() >= 0.5 and tensor.abs().max() < 2 for tensor in list(state.values())[::7])
print(sum(tensor.nbytes for tensor in state.values()))
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("", 2)])
def test_smolvla_of_full_size_loads_within_its_weights_and_a_gigabyte(tmp_path: Path, dtype: str, size: int) -> None:
    assert write_folder(tmp_path / "smolvla", "smolvla", shards=4) == 450_046_176
    arguments = [sys.executable, "-c", LOAD, str(tmp_path / "smolvla"), dtype]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    assert weights == size * 393_519_456  # without what no action depends on
    assert peak <= weights + 1_000_000_000, f"{peak / 1e9:.2f} GB for weights of {weights / 1e9:.2f} GB"
    print(f"peak {peak / 1e9:.3f} GB for weights of {weights / 1e9:.3f} GB")
