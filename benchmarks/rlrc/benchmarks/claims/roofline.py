"""How near the parts of a decision come to what this machine can do: its bandwidth and its products, measured in the
same run.

The limit of a part is that of rlrc.jetson.model.roofline: every operation takes as long as its products at the fastest
measured rate or its memory traffic at the measured bandwidth, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np

from rlrc.artifact import Manifest
from rlrc.artifact.precisions import PRECISIONS, Precision
from rlrc.benchmarks.measure.bandwidth import read_bandwidth
from rlrc.jetson.model.devices import CPU, Device
from rlrc.jetson.model.roofline import MEASURED, demand
from rlrc.jetson.model.work import Load, Part, work

ROWS, WIDE = 512, 4096  # of the product that the throughput is measured with
TRIALS = 5
WIDE_ACTIVATIONS = 4  # bytes: both runtimes keep float32 between products
# Precisions of graphs as what they read of memory and compute in: ONNX Runtime's, llama.cpp's and torch's.
KERNELS: dict[str, Precision] = {
    **{name: replace(each, compute=(each.cpu,)) for name, each in PRECISIONS.items() if each.cpu},
    "llama.cpp fp16": replace(PRECISIONS["fp16"], compute=("fp32",), widened=None),
    "torch fp32": replace(PRECISIONS["fp32"], compute=("fp32",)),
    "torch bf16": replace(PRECISIONS["bf16"], compute=("bf16",), widened=None),
    "llama.cpp int4": replace(PRECISIONS["int4"], compute=("int8",)),
}
GRAPHS = {"vision": "vision", "prefix": "prefix", "steps": "step", "head": "decoder"}  # others are the decoder's


@dataclass(frozen=True)
class Peaks:
    """What was measured: bytes and operations a second, by the type that products are computed in."""

    bandwidth: float
    products: dict[str, float]

    def record(self) -> dict[str, Any]:
        rates = {kind: round(rate / 1e9, 1) for kind, rate in self.products.items()}
        return {"read_gb_s": round(self.bandwidth / 1e9, 1), "products_gop_s": rates}


@dataclass(frozen=True)
class PartLimit:
    """One part of a decision: milliseconds of the limit and as measured, and what binds it."""

    limit_ms: float
    measured_ms: float
    share: float
    bound: str  # "products" or "memory", whichever takes longer in all


def measure(threads: int) -> Peaks:
    """Bandwidth, and the products of ONNX Runtime in float32 and 8-bit integers; llama.cpp's are of the same kinds."""
    rates = {kind: _throughput(kind, threads) for kind in ("fp32", "int8")}
    return Peaks(1e9 * max(read_bandwidth(threads) for _ in range(TRIALS)), rates)


def best(measured: Sequence[Peaks]) -> Peaks:
    """Of several times in a run: the least disturbed of each."""
    kinds = dict.fromkeys(kind for peaks in measured for kind in peaks.products)
    products = {kind: max(peaks.products.get(kind, 0.0) for peaks in measured) for kind in kinds}
    return Peaks(max(peaks.bandwidth for peaks in measured), products)


def _throughput(kind: str, threads: int) -> float:
    """Operations a second of the engine's own product."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {"fp32": rng.standard_normal((WIDE, WIDE), np.float32)}
    weights["int8"] = rng.integers(-127, 128, (WIDE, WIDE), np.int8)
    constants = {"b": weights[kind]}
    if kind == "int8":
        constants |= {"scale": np.full(WIDE, 1e-3, np.float32), "zero": np.zeros((), np.int8)}
        node = helper.make_node("DynamicQuantizeMatMul", ["a", *constants], ["y"], domain="com.microsoft")
    else:
        node = helper.make_node("MatMul", ["a", "b"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (ROWS, WIDE)) for name in ("a", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], kind, ends[:1], ends[1:], stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    a = rng.standard_normal((ROWS, WIDE), np.float32)
    return fastest(lambda: session.run(None, {"a": a}), 2.0 * ROWS * WIDE * WIDE, threads)


def fastest(call: Callable[[], object], operations: float, threads: int) -> float:
    """Operations a second of the least disturbed of several calls, all of whose threads work all the time.

    Where others use the machine, processor time tells what a call would take alone.
    """
    call()
    seconds = []
    for _ in range(TRIALS):
        spent, started = process_time(), perf_counter()
        call()
        seconds.append(min(perf_counter() - started, (process_time() - spent) / threads))
    return operations / min(seconds)


def compare_with_limits(
    manifest: Manifest, kernels: Mapping[str, str], peaks: Peaks, measured: Mapping[str, list[float]], words: int
) -> dict[str, dict[str, Any]]:
    """Of every part that was timed (milliseconds of each trial). ``kernels``: what each graph runs in, see KERNELS."""
    device = Device(CPU, "this machine", "measured", None, peaks.products, peaks.bandwidth, 0, None)
    parts = work(manifest.policy, manifest.towers, Load(prompt_tokens=words)).parts
    found = {}
    for name, times in measured.items():
        # OpenVLA-OFT's head is part of its decoder's graph.
        own = [part for part in parts if part.name == name or (name == "prefill" and part.name == "head")]
        if own:
            found[name] = asdict(_compare_part(own, kernels, device, median(times)))
    return found


def _compare_part(parts: list[Part], kernels: Mapping[str, str], device: Device, measured_ms: float) -> PartLimit:
    limit = products = traffic = 0.0
    for part in parts:
        kernel = replace(KERNELS[kernels[GRAPHS.get(part.name, "decoder")]], activation=WIDE_ACTIVATIONS)
        asked = demand(part, kernel, device)
        limit += asked.seconds(MEASURED)
        products += float(asked.arithmetic.sum())
        traffic += float(asked.traffic.sum())
    bound = "products" if products >= traffic else "memory"
    return PartLimit(round(1e3 * limit, 2), round(measured_ms, 2), round(1e3 * limit / measured_ms, 3), bound)
