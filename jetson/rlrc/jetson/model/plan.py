"""Predicts latency by part, peak memory and energy of a policy on a device, without the device.

A prediction is arithmetic (work.py, roofline.py, memory.py) on a ``Setting``. A plan adds whether the rate holds, what
is refused, and every assumption. suggest.py proposes changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rlrc.artifact import Artifact, PolicySpec, TowerSpec, geometries
from rlrc.artifact.precisions import Precision
from rlrc.jetson.model import memory as memory_model
from rlrc.jetson.model import roofline
from rlrc.jetson.model.devices import Device
from rlrc.jetson.model.memory import PeakMemory, weight_bytes
from rlrc.jetson.model.precision import PRECISIONS, computes, precision, refusals, resident_bits
from rlrc.jetson.model.roofline import Stack, latencies
from rlrc.jetson.model.work import DecisionWork, Load, work

CAPTURED = 640 * 480  # pixels of a camera's picture before it is resized
DISK = 2e9  # bytes a second of an NVMe disk
HOST = 8e-9  # seconds of a Jetson's CPU for each captured and each resized pixel
DRAWN = 0.6  # part of a mode's power limit, while the policy runs: 21 to 26 W of 40 W on an Orin NX (vla.cpp's report)


@dataclass(frozen=True)
class Setting:
    """``name``: the policy as given on the command line. ``base``: see memory.predict.

    ``sequential``: one engine is resident at a time; each decision reads all of them from disk.
    """

    name: str
    policy: PolicySpec
    towers: dict[str, TowerSpec]
    precision: Precision
    device: Device
    load: Load = field(default_factory=Load)
    stack: Stack | None = None
    base: int = 0
    sequential: bool = False

    @property
    def work(self) -> DecisionWork:
        return work(self.policy, self.towers, self.load)

    @property
    def cameras(self) -> int:
        return self.load.cameras or len(self.policy.cameras)

    @property
    def horizon(self) -> int:
        return self.load.horizon or self.policy.action.horizon


@dataclass(frozen=True)
class Prediction:
    """``parts`` in milliseconds; ``bounds``: latency with compiled kernels and with plain kernels."""

    parts: dict[str, float]
    bounds: tuple[float, float]
    memory: PeakMemory
    joules: float | None

    @property
    def latency_ms(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """``deadline_ms``: the longest allowed inference; None without a requested rate."""

    setting: Setting
    prediction: Prediction
    deadline_ms: float | None
    refusals: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def holds(self) -> bool | None:
        return None if self.deadline_ms is None else self.prediction.latency_ms <= self.deadline_ms

    @property
    def possible(self) -> bool:
        """Whether it fits, nothing is refused, and the requested rate, if any, holds."""
        return self.prediction.memory.fits and not self.refusals and self.holds is not False


def of_geometry(name: str, precision_name: str | None, device: Device, load: Load, stack: Stack | None) -> Setting:
    """Raises UserError for an unknown geometry or precision."""
    known = geometries.geometry(name)
    return Setting(name, known.policy, known.towers, precision(precision_name or "bf16"), device, load, stack)


def of_artifact(
    artifact: Artifact, precision_name: str | None, device: Device, load: Load, stack: Stack | None
) -> Setting:
    """By default in the precision of the artifact's graphs, or of its weights. Raises UserError."""
    manifest = artifact.manifest
    chosen = precision(precision_name or own_precision(artifact, device))
    if manifest.quantization is not None:
        chosen = chosen.regrouped(manifest.quantization.group)
    return Setting(str(artifact.path), manifest.policy, manifest.towers, chosen, device, load, stack)


def own_precision(artifact: Artifact, device: Device) -> str:
    """On a CPU the precision of ONNX Runtime's graphs; on a Jetson that of TensorRT's graphs, or of the weights."""
    manifest = artifact.manifest
    backend = "tensorrt" if device.sm else "onnxruntime"
    for graph in manifest.graphs:
        if graph.backend == backend and graph.precision in PRECISIONS:
            return graph.precision
    return {"float32": "fp16", "bfloat16": "bf16", "int4": "int4", "int8": "w8"}[manifest.dtype]


def predict(setting: Setting) -> Prediction:
    asked, chosen, device = setting.work, setting.precision, setting.device
    host = {"preprocess": 1e3 * _preprocess_seconds(setting)}
    parts = host | latencies(asked, chosen, device, setting.stack)
    memory = memory_model.predict(asked, chosen, device, setting.cameras, setting.base)
    if setting.sequential:
        reading = {"reading": 1e3 * memory.weights / DISK}
        host, parts = host | reading, parts | reading
        memory = replace(memory, weights=max(weight_bytes(part, chosen) for part in asked.parts))
    both: tuple[Stack, Stack] = ("compiled", "plain")
    low, high = (sum(host.values()) + sum(latencies(asked, chosen, device, stack).values()) for stack in both)
    joules = None if device.watts is None else DRAWN * device.watts * sum(parts.values()) / 1e3
    return Prediction(parts, (low, high), memory, joules)


def _preprocess_seconds(setting: Setting) -> float:
    camera = setting.policy.cameras[0]
    own = camera.height * camera.width
    return HOST * setting.cameras * (own + (own if camera.resize == "none" else CAPTURED))


def plan(setting: Setting, hz: float | None = None) -> Plan:
    deadline = None if hz is None else deadline_ms(setting.horizon, hz)
    refused = refusals(setting.precision, setting.device, setting.policy.family)
    return Plan(setting, predict(setting), deadline, tuple(refused), tuple(assumptions(setting)))


def deadline_ms(horizon: int, hz: float) -> float:
    """The longest inference for a control loop at this rate, in milliseconds.

    Inference runs in parallel with the loop. When a chunk is ready, its first latency * hz steps have passed, and as
    many pass until the next chunk is ready. So twice the latency must not exceed a chunk. A single action must be ready
    within one period.
    """
    return 1e3 / hz if horizon == 1 else 1e3 * horizon / (2 * hz)


def assumptions(setting: Setting) -> list[str]:
    device, chosen = setting.device, setting.precision
    found = list(setting.work.assumptions)
    found.append(
        f"{chosen.name}: {resident_bits(chosen, device):g} bits a weight of the linear layers, {chosen.other:g} of "
        f"others; products in {computes(chosen, device)}"
    )
    if device.sm is None:
        found.append("throughput and bandwidth of this machine, measured now and reached in full")
    else:
        stack = setting.stack or ("compiled" if chosen.bits < 16 else "geometric mean of compiled and plain")
        reached = roofline.efficiency(device, chosen, setting.stack)
        found.append(
            f"kernels: {stack}; large products reach {reached.compute:.0%} of the peak, those of s^3 multiply-adds "
            f"s / (s + {reached.side:g}) of that; {reached.bandwidth:.0%} of the bandwidth; "
            f"{reached.launch * 1e6:g} us a kernel (rlrc jetson calibration)"
        )
        found.append(f"clocks of {device.mode} held, nothing else on the GPU")
    found.append(f"{HOST * 1e9:g} ns of the CPU a pixel: the policy's, and {CAPTURED:,} of pictures to be resized")
    found += memory_model.assumptions(device)
    if setting.sequential:
        found.append(f"one engine resident at a time, all read from a disk of {DISK / 1e9:g} GB/s at every decision")
    if device.watts is not None:
        found.append(f"{DRAWN:.0%} of the mode's {device.watts:g} W drawn while it runs")
    return found


def prune(setting: Setting, ratio: float) -> Setting:
    """Removes this part of the heads and channels of the intermediate blocks of the tower that `rlrc prune` cuts.

    One head for each key/value head and 32 channels remain at least, and all key/value heads that an expert attends to.
    Widths are multiples of 32.
    """
    name = "encoder" if "encoder" in setting.towers else "decoder"
    tower = setting.towers[name]
    grouped = "expert" in setting.towers
    layers = list(tower.layers)
    for i in range(1, len(layers) - 1):
        layer = layers[i]
        least = layer.kv_heads if grouped or layer.kv_heads < layer.heads else 1
        heads = max(round(layer.heads * (1 - ratio) / least) * least, least)
        kv_heads = layer.kv_heads if layer.kv_heads < layer.heads or grouped else heads
        mlp = max(round(layer.mlp * (1 - ratio) / 32) * 32, min(32, layer.mlp))
        layers[i] = replace(layer, heads=heads, kv_heads=kv_heads, mlp=mlp)
    return replace(setting, towers={**setting.towers, name: replace(tower, layers=tuple(layers))})


def record(found: Plan, suggestions: list[str]) -> dict[str, Any]:
    """JSON values."""
    prediction, setting = found.prediction, found.setting
    memory = prediction.memory
    return {
        "policy": setting.name,
        "family": setting.policy.family,
        "device": setting.device.name,
        "mode": setting.device.mode,
        "precision": setting.precision.name,
        "stack": setting.stack,
        "latency_ms": prediction.latency_ms,
        "latency_range_ms": list(prediction.bounds),
        "parts": prediction.parts,
        "peak_bytes": memory.peak,
        "available_bytes": memory.visible - memory.reserve,
        "memory": memory.record(),
        "fits": memory.fits,
        "builds": memory.builds,
        "energy_j": prediction.joules,
        "deadline_ms": found.deadline_ms,
        "holds": found.holds,
        "refusals": list(found.refusals),
        "suggestions": suggestions,
        "assumptions": list(found.assumptions),
    }
