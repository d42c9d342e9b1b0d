"""Compare the parts of a decision with the limits of this machine: bandwidth and products, measured in the same run.

The limit of a part is that of rlrc.jetson.model.roofline: each operation takes the longer of its products at the
fastest measured rate and its memory traffic at the measured bandwidth.
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

ROWS, WIDE = 512, 4096  # of the measured product
TRIALS = 5
WIDE_ACTIVATIONS = 4  # bytes: both runtimes keep float32 between products
# What graphs read from memory and compute in, by precision and runtime (ONNX Runtime without a prefix).
KERNELS: dict[str, Precision] = {
    **{name: replace(each, compute=(each.cpu,)) for name, each in PRECISIONS.items() if each.cpu},
    "llama.cpp fp16": replace(PRECISIONS["fp16"], compute=("fp32",), widened=None),
    "torch fp32": replace(PRECISIONS["fp32"], compute=("fp32",)),
    "torch bf16": replace(PRECISIONS["bf16"], compute=("bf16",), widened=None),
    "llama.cpp int4": replace(PRECISIONS["int4"], compute=("int8",)),
}
GRAPHS = {"vision": "vision", "prefix": "prefix", "steps": "step", "head": "decoder"}  # other parts: the decoder


@dataclass(frozen=True)
class Peaks:
    """Measured bytes a second, and operations a second by the type of the products."""

    bandwidth: float
    products: dict[str, float]

    def record(self) -> dict[str, Any]:
        rates = {kind: round(rate / 1e9, 1) for kind, rate in self.products.items()}
        return {"read_gb_s": round(self.bandwidth / 1e9, 1), "products_gop_s": rates}


@dataclass(frozen=True)
class PartLimit:
    """One part of a decision: milliseconds of the limit and as measured, and the bottleneck."""

    limit_ms: float
    measured_ms: float
    share: float
    bound: str  # "products" or "memory", the one with the longer sum


def measure(threads: int) -> Peaks:
    """Measure bandwidth and ONNX Runtime's products in float32 and int8, the types that llama.cpp uses as well."""
    rates = {kind: _throughput(kind, threads) for kind in ("fp32", "int8")}
    return Peaks(1e9 * max(read_bandwidth(threads) for _ in range(TRIALS)), rates)


def best(measured: Sequence[Peaks]) -> Peaks:
    """The highest value of each peak among several measurements of a run."""
    kinds = dict.fromkeys(kind for peaks in measured for kind in peaks.products)
    products = {kind: max(peaks.products.get(kind, 0.0) for peaks in measured) for kind in kinds}
    return Peaks(max(peaks.bandwidth for peaks in measured), products)


def _throughput(kind: str, threads: int) -> float:
    """Operations a second of ONNX Runtime's product."""
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
    """Operations a second of the fastest of several calls that keep all threads busy.

    On a shared machine, processor time divided by threads estimates the time of a call without other load.
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
    """Compare every timed part (milliseconds of each trial). ``kernels``: graph -> name in KERNELS."""
    device = Device(CPU, "this machine", "measured", None, peaks.products, peaks.bandwidth, 0, None)
    parts = work(manifest.policy, manifest.towers, Load(prompt_tokens=words)).parts
    limits = {}
    for name, times in measured.items():
        # OpenVLA-OFT's head is part of the decoder graph.
        own = [part for part in parts if part.name == name or (name == "prefill" and part.name == "head")]
        if own:
            limits[name] = asdict(_compare_part(own, kernels, device, median(times)))
    return limits


def _compare_part(parts: list[Part], kernels: Mapping[str, str], device: Device, measured_ms: float) -> PartLimit:
    limit = products = traffic = 0.0
    for part in parts:
        kernel = replace(KERNELS[kernels[GRAPHS.get(part.name, "decoder")]], activation=WIDE_ACTIVATIONS)
        load = demand(part, kernel, device)
        limit += load.seconds(MEASURED)
        products += float(load.arithmetic.sum())
        traffic += float(load.traffic.sum())
    bound = "products" if products >= traffic else "memory"
    return PartLimit(round(1e3 * limit, 2), round(measured_ms, 2), round(1e3 * limit / measured_ms, 3), bound)
