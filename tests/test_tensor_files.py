"""Files of tensors, written one at a time, and temporary ones (rlrc.compressor.models.storage)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrc.compressor.models.storage.scratch import Scratch, keep
from rlrc.compressor.models.storage.tensor_files import INDEX, NAME, write_tensors
from rlrc.compressor.models.storage.tensors import DTYPES, Tensors, tensors_from_safetensors


def mixed() -> dict[str, Tensor]:
    found = {f"z{i}.ü": (torch.randn(3, 5) * 3).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    return found | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "a.scale": torch.ones(1, 2).half()}


def test_the_file_is_the_librarys(tmp_path: Path) -> None:
    tensors = mixed()
    save_file(tensors, tmp_path / "expected.safetensors")
    write_tensors(tmp_path, Tensors("the test", tensors))
    assert (tmp_path / NAME).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert not (tmp_path / INDEX).exists()


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    shapes = {name: torch.empty(4, 4, device="meta") for name in "abc"}
    alive: list[str] = []

    def read(name: str) -> Tensor:
        alive.append(name)
        return torch.full((4, 4), float(ord(name)))

    write_tensors(tmp_path, Tensors("the test", shapes, read))
    assert alive == ["a", "b", "c"]
    assert float(load_file(tmp_path / NAME)["b"][0, 0]) == ord("b")


def test_another_tensor_than_announced_is_refused(tmp_path: Path) -> None:
    wrong = Tensors("the test", {"a": torch.empty(4, 4, device="meta")}, lambda name: torch.zeros(4, 5))
    with pytest.raises(RuntimeError, match="a was announced as another tensor"):
        write_tensors(tmp_path, wrong)


def test_shards(tmp_path: Path) -> None:
    """Tensors of 100 bytes in files of at most 250; one of 400 has its own."""
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(5)} | {"u": torch.zeros(100)}
    write_tensors(tmp_path, Tensors("the test", tensors), shard=250)
    index = json.loads((tmp_path / INDEX).read_text())
    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert index["metadata"] == {"total_size": 900}
    assert index["weight_map"] == {
        "t0": names[0], "t1": names[0], "t2": names[1], "t3": names[1], "t4": names[2], "u": names[3]
    }  # fmt: skip
    found = tensors_from_safetensors([tmp_path / name for name in names], "the test")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_scratch_leaves_no_file(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    tensor = torch.randn(6, 7)
    kept = keep(tensor, scratch.empty)
    kept[0] = 1
    tensor[0] = 1
    assert torch.equal(kept, tensor)
    assert not list(tmp_path.iterdir())
    assert torch.equal(scratch.empty((2, 3), dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8))
    assert scratch.empty((0, 3), dtype=torch.float32).shape == (0, 3)


def test_a_full_disk_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011 (No space left on device, or File too large)
        Scratch(tmp_path).empty((2**46,), dtype=torch.float32)
    assert not list(tmp_path.iterdir())
