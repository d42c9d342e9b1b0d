"""GPTQ (arXiv 2210.17323): the columns that are not rounded yet compensate for the error of those that are.

A layer's columns are rounded to the nearest level from first to last. Each column's error is distributed over the
remaining columns so that the outputs on the calibration inputs change least, by X^T X (section 3, algorithm 1, with the
Cholesky form of its step 3). A group's scale is chosen at its first column, from weights that include all errors so
far; the result is on the same grid as with the other methods. The inputs X are those of the float policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlrc.compressor.models.device import widest_float
from rlrc.compressor.models.nn.linear import list_parts
from rlrc.compressor.quantize.grid import GROUP, LEVELS, Rounded, fit_group, quantize_groups, round_to_grid

DAMPENING = 0.01
"""times the mean of the diagonal, added to the diagonal (as in the paper)"""


def gptq(weight: Tensor, factor: Tensor, bits: int, search: bool, group: int = GROUP) -> Rounded:
    """Round weight (out, in) with ``feedback`` (in, in) of its inputs; other arguments: see ``quantize_groups``."""
    size = fit_group(weight.shape[1], group)
    low, high = LEVELS[bits]
    rest, integers = weight.detach().to(torch.float32, copy=True), weight.new_empty(weight.shape, dtype=torch.int8)
    scales = list[Tensor]()
    for start in range(0, weight.shape[1], size):
        end = start + size
        block = factor[start:end, start:].float()
        columns, errors = rest[:, start:end].clone(), list[Tensor]()
        scale = quantize_groups(columns, bits, search, size)[1]
        step = scale[:, 0].float()
        for i in range(size):
            rounded = round_to_grid(columns[:, i], step, low, high)
            row = block[i]
            error = (columns[:, i] - rounded * step) / row[i]
            columns[:, i + 1 :] -= error[:, None] * row[i + 1 : size]
            integers[:, start + i] = rounded
            errors.append(error)
        all_errors = torch.stack(errors, 1)
        for part in list_parts(weight.shape):
            rest[part, end:] -= all_errors[part] @ block[:, size:]
        scales.append(scale)
    return integers, torch.cat(scales, 1)


def feedback(rows: Tensor) -> Tensor:
    """Upper Cholesky factor (in, in) of the inverse of the dampened X^T X, in float64 if the device has it.

    If all inputs are zero it is that of the identity: no error is distributed, so the weights round to nearest.
    """
    wide = rows.to(widest_float(rows.device))
    matrix = wide.T @ wide
    mean = matrix.diagonal().mean()
    matrix.diagonal().add_(torch.where(mean == 0, 1.0, DAMPENING * mean))
    # In place, which LAPACK does for columns one after the other in memory: 2 GB for 16,384 inputs.
    factor = matrix.mT
    torch.linalg.cholesky(factor, out=factor)
    torch.cholesky_inverse(factor, out=factor)
    torch.linalg.cholesky(factor, upper=True, out=factor)
    return factor


class Feedback:
    """``feedback`` of a layer's inputs on this device, computed once for consecutive layers that share them."""

    def __init__(self) -> None:
        self._rows, self._factor = torch.empty(0), torch.empty(0)

    def of(self, rows: Tensor, device: torch.device) -> Tensor:
        if rows is not self._rows:
            self._factor = torch.empty(0)  # of the layers before, which may be large
            self._rows, self._factor = rows, feedback(rows.to(device))
        return self._factor
