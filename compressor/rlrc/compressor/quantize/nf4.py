"""NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E), to compare the int4 grid with. It is never stored.

Its 16 levels are quantiles of a normal distribution; only bitsandbytes, on a GPU, computes with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
BITS = 4 + 32 / GROUP  # per weight, with a float32 scale per group; QLoRA quantizes the scales too, this does not

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
    """Round weight (out, in) to NF4, in float32. As in bitsandbytes, groups of 64 go row by row through the weight."""
    flat = weight.detach().float().flatten()
    groups = F.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(groups / largest.clamp(min=torch.finfo().tiny), between)
    return (levels[index] * largest).flatten()[: len(flat)].view_as(weight)
