"""What torch computes products in: float32, or bfloat16 by autocast where the processor or accelerator is quicker so.

A processor without bfloat16 instructions emulates it: two-core AVX2 takes 10 to 100 times longer for a product than in
float32, AVX-512 without BF16 1.2 times. torch's own queries tell what the processor has, not which kernels are used
(oneDNN may be limited, and says that bfloat16 is supported where it emulates it), so products are timed: a tenth of a
second. Weights, gradients and sums are float32 in either case.

The choice holds for a process (``use``), as torch's number of threads does. Workers are given that of their parent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from time import perf_counter, thread_time
from typing import Literal

import torch
import torch.nn.functional as F

Precision = Literal["float32", "bfloat16"]
PrecisionOption = Literal["auto", "float32", "bfloat16"]
PrecisionByDevice = dict[str, Precision]
"""By type of device: {"cpu": "float32"}. Simulators' workers compute on the CPU even where a GPU trains."""

TRAINING = (512, 256, 1024)  # rows, inputs, outputs of a product
GAIN = 0.9  # part of float32's time that bfloat16 may take: float32 is more exact
HOPELESS = 3.0  # times slower: one round is enough
ROUNDS = 5  # the first warms up

_chosen: PrecisionByDevice = {}


def use(chosen: Mapping[str, Precision]) -> None:
    """For all products of this process from now on."""
    _chosen.clear()
    _chosen.update(chosen)


def current() -> PrecisionByDevice:
    return dict(_chosen)


def choose(wanted: PrecisionOption, *devices: str) -> PrecisionByDevice:
    """For these types of device ("cpu", "cuda"): what was wanted, or the quicker one."""
    return {device: pick_for_training(device) if wanted == "auto" else wanted for device in devices}


def autocast(device: str) -> torch.autocast:
    """Products within it are computed in the precision of this process; measured where nothing was chosen."""
    if device not in _chosen:
        _chosen.update(choose("auto", device))
    return torch.autocast(device, torch.bfloat16, enabled=_chosen[device] == "bfloat16")


@cache
def pick_for_training(device: str) -> Precision:
    """For training: a layer forwards and backwards, by autocast."""
    rows, inputs, outputs = TRAINING
    with torch.inference_mode(False):
        x = torch.ones(rows, inputs, device=device)
        weight = torch.ones(outputs, inputs, device=device, requires_grad=True)

    def product(dtype: torch.dtype) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = F.linear(x, weight).float().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        gradient.sum().item()  # waits for an accelerator

    with torch.inference_mode(False), torch.enable_grad():
        return _quicker([product], device)


@cache
def pick_for_inference() -> Precision:
    """For inference with weights stored in it: one row, as a decoder's step has, and a prompt's, through a layer that
    no cache holds in float32."""
    weights = {dtype: torch.ones(4096, 4096, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}

    def rows(number: int) -> Callable[[torch.dtype], object]:
        return lambda dtype: F.linear(torch.ones(number, 4096, dtype=dtype), weights[dtype])

    with torch.inference_mode():
        return _quicker([rows(1), rows(64)])


def _quicker(products: Sequence[Callable[[torch.dtype], object]], device: str = "cpu") -> Precision:
    """By the sum of the least times of all products, in turns.

    On the CPU in one thread and by that thread's own time: other programs that want the processor change wall time by
    more than the two types differ, and several threads wait for each other.
    """
    types: dict[torch.dtype, Precision] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    best = {dtype: [float("inf")] * len(products) for dtype in types}
    clock, threads = thread_time if device == "cpu" else perf_counter, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(ROUNDS):
            for dtype, times in best.items():
                for i, product in enumerate(products):
                    started = clock()
                    product(dtype)
                    if turn:
                        times[i] = min(times[i], clock() - started)
            totals = {dtype: sum(times) for dtype, times in best.items()}
            if turn and totals[torch.bfloat16] > HOPELESS * totals[torch.float32]:
                break
    finally:
        torch.set_num_threads(threads)
    return "bfloat16" if totals[torch.bfloat16] < GAIN * totals[torch.float32] else "float32"
