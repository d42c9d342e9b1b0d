"""What linear layers are given on calibration observations: a sample of their inputs' rows, never all of them.

The float policy is run once over the observations. Everything a method wants to know follows from the sample: mean |x|
of the channels (AWQ), X^T X (GPTQ), the error that a rounded weight makes in a layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor, nn

from rlrc.compressor.models.nn.vit import PatchStem, merge_patches
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.errors import UserError

ROWS = 2048
"""of a layer that are kept, drawn evenly: 33 MB for 4,096 channels, where X^T X would be 67 MB, and 90 against 484 for
11,008. Layers wider than that have more channels than rows; GPTQ's dampening fills up what their X^T X does not say."""


class RowSample:
    """At most ``ROWS`` of all rows that were added, every one with the same chance."""

    def __init__(self) -> None:
        self.rows, self.ranks = torch.empty(0), torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        self.ranks = torch.cat([self.ranks, torch.rand(len(rows), generator=self.generator)])
        self.rows = torch.cat([self.rows, rows]) if len(self.rows) else rows.clone()
        if len(self.rows) > ROWS:
            kept = self.ranks.topk(ROWS).indices
            self.rows, self.ranks = self.rows[kept], self.ranks[kept]


def check_calibration(calibration: Iterable[Inputs]) -> list[Inputs]:
    """All of them, for they are gone through several times. Raises UserError for NaN and infinity."""
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


def collect_inputs(policy: PolicyModule, calibration: Iterable[Inputs], names: Container[str]) -> dict[str, Tensor]:
    """Rows (n, in) in float32 that the linear layers with weights of these names were given.

    Layers that share an input (q, k and v) share the sample. A layer that was never run is left out.
    """
    samples, source = dict[str, RowSample](), dict[str, str]()
    last: list[tuple[Tensor, str]] = []  # the latest input, kept so that no other tensor can take its place in memory

    def hook(name: str, rows: Callable[[Tensor], Tensor] | None = None) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(module: nn.Module, given: tuple[Tensor]) -> None:
            x = given[0]
            if name not in source:
                source[name] = last[0][1] if last and last[0][0] is x else name
            if source[name] == name:
                samples.setdefault(name, RowSample()).add(x if rows is None else rows(x))
                last[:] = [(x, name)]

        return add

    handles = []
    for name, module in policy.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in names:
            handles.append(module.register_forward_pre_hook(hook(f"{name}.weight")))
        elif isinstance(module, PatchStem) and len(module.factors) == 1 and f"{name}.steps.0.weight" in names:
            # Computed as a convolution, so that the linear layer itself is never called.
            patches = _patches(module.factors[0])
            handles.append(module.register_forward_pre_hook(hook(f"{name}.steps.0.weight", patches)))
    try:
        with torch.inference_mode():
            for inputs in calibration:
                policy.act(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: samples[first].rows.clone() for name, first in source.items()}


def _patches(factor: int) -> Callable[[Tensor], Tensor]:
    return lambda x: merge_patches(x, factor)
