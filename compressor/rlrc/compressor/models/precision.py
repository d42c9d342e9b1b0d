"""The precision of matrix products in torch: float32, or bfloat16 by autocast where that is faster.

A processor without bfloat16 instructions emulates them: a product takes 10 to 100 times longer than in float32 on two
AVX2 cores, and 1.2 times on AVX-512 without BF16. torch reports what the processor supports, not which kernels are used
(oneDNN may be restricted, and reports emulated bfloat16 as supported), so both precisions are timed, in a tenth of a
second. Weights, gradients and sums are float32 in either case.

The choice applies to the whole process (``use``), like torch's number of threads. Workers inherit it from their parent.
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
"""For example {"cpu": "float32"}. Simulation workers use the CPU even if training uses a GPU."""

TRAINING = (512, 256, 1024)  # rows, inputs, outputs of a product
GAIN = 0.9  # bfloat16 is chosen below this part of float32's time, since float32 is more exact
HOPELESS = 3.0  # times slower than float32: stop timing after one round
ROUNDS = 5  # the first is a warm-up

_chosen: PrecisionByDevice = {}


def use(chosen: Mapping[str, Precision]) -> None:
    """Set the precision of all products of this process from now on."""
    _chosen.clear()
    _chosen.update(chosen)


def current() -> PrecisionByDevice:
    """The precisions in use in this process."""
    return dict(_chosen)


def choose(wanted: PrecisionOption, *devices: str) -> PrecisionByDevice:
    """The requested precision for these device types ("cpu", "cuda"), or the faster one for "auto"."""
    return {device: pick_for_training(device) if wanted == "auto" else wanted for device in devices}


def autocast(device: str) -> torch.autocast:
    """Context in which products have this process's precision, which is measured first if none was set."""
    if device not in _chosen:
        _chosen.update(choose("auto", device))
    return torch.autocast(device, torch.bfloat16, enabled=_chosen[device] == "bfloat16")


@cache
def pick_for_training(device: str) -> Precision:
    """The faster precision for training: one layer, forward and backward, under autocast."""
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
        return _pick([product], device)


@cache
def pick_for_inference() -> Precision:
    """The faster precision for inference with weights stored in it: one row (a decoding step) and 64 rows (a prompt)
    through a layer that is larger than the caches."""
    weights = {dtype: torch.ones(4096, 4096, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}

    def rows(number: int) -> Callable[[torch.dtype], object]:
        return lambda dtype: F.linear(torch.ones(number, 4096, dtype=dtype), weights[dtype])

    with torch.inference_mode():
        return _pick([rows(1), rows(64)])


def _pick(products: Sequence[Callable[[torch.dtype], object]], device: str = "cpu") -> Precision:
    """The precision with the smaller sum of the products' minimum times; the two are timed alternately.

    On the CPU, products run in one thread and that thread's CPU time counts: the load of other programs changes wall
    time by more than the precisions differ, and several threads wait for each other.
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
