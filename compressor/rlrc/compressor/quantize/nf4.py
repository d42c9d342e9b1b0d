"""NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E): a yardstick for the int4 grid, never stored.

Its 16 levels are quantiles of a normal distribution and no runtime's integers: only bitsandbytes computes with them, on
a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
BITS = 4 + 32 / GROUP  # a weight: a float32 scale for each group, without QLoRA's second quantization of the scales

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def round_to_nf4(weight: Tensor) -> Tensor:
    """weight (out, in) -> the weight rounded to NF4, in float32.

    Groups of 64 run through the weight row by row, as in bitsandbytes; each is divided by its largest magnitude.
    """
    flat = weight.detach().float().flatten()
    groups = F.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    between = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(groups / largest.clamp(min=torch.finfo().tiny), between)
    return (levels[index] * largest).flatten()[: len(flat)].view_as(weight)
