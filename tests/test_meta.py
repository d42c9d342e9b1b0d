"""Policies on the meta device: no initialiser runs, and the slow import that they cause is left out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlrc.compressor.checkpoints import geometry, reader, tensors
from rlrc.compressor.checkpoints.layout import TensorOrigin
from rlrc.compressor.models.meta import on_meta


class Writes(TorchDispatchMode):
    """The operations that write into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", geometry.GEOMETRIES)
def test_no_initialiser_runs_on_the_meta_device(name: str) -> None:
    layout = reader.layout(*geometry.folder(name))
    with Writes() as writes:
        policy = reader.build(layout)
    assert writes.found == []
    assert {tensor.device.type for tensor in policy.state_dict().values()} == {"meta"}


def test_initialisers_run_again_outside() -> None:
    with on_meta():
        nn.Linear(4, 4)
    assert nn.LayerNorm(4).weight.tolist() == [1.0] * 4


def test_inspecting_a_checkpoint_does_not_import_dynamo() -> None:
    code = (
        "import sys; from rlrc.runtime.cli import main; main(['inspect', '--geometry', 'openvla-oft-7b', '--json']);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert ended.returncode == 0


@pytest.mark.parametrize("others", [[(3, 4)], [(1, 4), (2, 4)]])
def test_joined_shapes_are_those_of_torch(others: list[tuple[int, ...]]) -> None:
    pieces = [torch.empty(shape) for shape in [(2, 4), *others]]
    origin = TensorOrigin(tuple("abc"[: len(pieces)]), "join")
    assert tensors.convert(origin, [piece.to("meta") for piece in pieces]).shape == torch.cat(pieces).shape


@pytest.mark.parametrize("other", [(2, 5), (4,), ()])
def test_shapes_that_torch_does_not_join_are_refused(other: tuple[int, ...]) -> None:
    pieces = [torch.empty(shape) for shape in [(2, 4), other]]
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError):
            tensors.convert(TensorOrigin(("a", "b"), "join"), [piece.to(device) for piece in pieces])
