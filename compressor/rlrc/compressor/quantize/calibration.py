"""Collects a sample of the input rows of linear layers, in one run of the float policy over calibration observations.

The methods derive all their statistics from the sample: the channels' mean |x| (AWQ), X^T X (GPTQ), and the error that
a rounded weight causes in the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from rlrc.compressor.models.device import upload
from rlrc.compressor.models.nn.vit import PatchStem, merge_patches
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.storage.scratch import Allocate
from rlrc.errors import UserError

ROWS = 2048
"""kept per layer, drawn uniformly: 33 MB for 4,096 channels (X^T X: 67 MB), 90 MB for 11,008 (X^T X: 484 MB). The X^T X
of a layer with more channels than rows is singular; GPTQ's dampening makes it invertible."""


class RowSample:
    """A uniform sample ``rows`` (n, in) of at most ``ROWS`` of the rows that were added, float32."""

    def __init__(self, room: Tensor) -> None:
        """``room`` (ROWS, in) float32 is where the rows are kept."""
        self._room, self.ranks = room, torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)

    @property
    def rows(self) -> Tensor:
        return self._room[: len(self.ranks)]

    def add(self, x: Tensor) -> None:
        new = x.detach().flatten(0, -2).float().to(self._room.device)
        ranks = torch.cat([self.ranks, torch.rand(len(new), generator=self.generator)])
        rows = torch.cat([self.rows, new])
        if len(rows) > ROWS:
            kept = ranks.topk(ROWS).indices
            rows, ranks = rows[upload(kept, rows.device)], ranks[kept]
        self.ranks = ranks
        self._room[: len(rows)] = rows


def check_calibration(calibration: Iterable[Inputs]) -> list[Inputs]:
    """The observations as a list. Raises UserError for NaN or infinity in one."""
    found = list(calibration)
    for i, inputs in enumerate(found):
        pixels = [(f"pixels[{camera}]", array) for camera, array in enumerate(inputs.pixels)]
        for name, array in [*pixels, ("state", inputs.state), ("noise", inputs.noise)]:
            if array is not None and not array.isfinite().all():
                raise UserError(
                    f"expected finite numbers in calibration observation {i}, found NaN or infinity in its {name}; "
                    "leave that observation out"
                )
    return found


def collect_inputs(
    policy: PolicyModule, calibration: Iterable[Inputs], names: Container[str], allocate: Allocate | None = None
) -> dict[str, Tensor]:
    """Sampled float32 inputs (n, in) of the linear layers whose weights have these names, by weight name.

    ``allocate`` makes room for the samples (default: where the inputs are). Layers that share an input (q, k and v)
    share the tensor. Layers that were never run are missing.
    """
    samples, source = dict[str, RowSample](), dict[str, str]()
    last: list[tuple[Tensor, str]] = []  # the latest input; holding it keeps ``is`` below unambiguous

    def hook(name: str, rows: Callable[[Tensor], Tensor] | None = None) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(module: nn.Module, given: tuple[Tensor]) -> None:
            x = given[0]
            if name not in source:
                source[name] = last[0][1] if last and last[0][0] is x else name
            if source[name] == name:
                x = x if rows is None else rows(x)
                if name not in samples:
                    make = allocate or partial(torch.empty, device=x.device)
                    samples[name] = RowSample(make((ROWS, x.shape[-1]), dtype=torch.float32))
                samples[name].add(x)
                last[:] = [(given[0], name)]

        return add

    handles = []
    for name, module in policy.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in names:
            handles.append(module.register_forward_pre_hook(hook(f"{name}.weight")))
        elif isinstance(module, PatchStem) and len(module.factors) == 1 and f"{name}.steps.0.weight" in names:
            # The stem runs as a convolution and never calls the linear layer itself.
            patches = _patches(module.factors[0])
            handles.append(module.register_forward_pre_hook(hook(f"{name}.steps.0.weight", patches)))
    try:
        with torch.no_grad():  # inference mode would make the samples useless outside
            for inputs in calibration:
                policy.act(inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: sample.rows for name, sample in samples.items()}
    return {name: found[first] for name, first in source.items()}


def _patches(factor: int) -> Callable[[Tensor], Tensor]:
    return lambda x: merge_patches(x, factor)
