"""Peak memory of a policy at work: on a Jetson, where the GPU shares it with Linux, and on this machine's CPU.

Every constant that is no arithmetic is named here and told in the plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rlrc.jetson.devices import Device
from rlrc.jetson.precision import Precision
from rlrc.jetson.work import Part, Work

MIB = 2**20
RUNTIME = 350 * MIB  # CUDA context, the engine's libraries, Python with numpy
RESERVE = 1024 * MIB  # Linux, drivers and services of a Jetson without a desktop
CAPTURE = 4 * 1280 * 720 * 2  # of a camera: four buffers of 1280 x 720 pixels in YUV 4:2:2
BUILDING = 3  # copies of a graph's weights while its engine is built: parsed, being optimised, serialized
WORKSPACE = 512 * MIB  # of the engine builder

# ONNX Runtime on a CPU, measured with rlrc bench memory (docs/decisions.md): what a process gains beside its weights
# between importing the runtime and running, and bytes of each weight that folding 4-bit integers to 8 bits leaves.
SESSION = 24 * MIB
FOLDING = 34


@dataclass(frozen=True)
class Memory:
    """Bytes. ``building``: the peak while the engines are built on the device, one graph at a time; 0: none is built.

    ``reserve`` is not the policy's own; ``visible`` is all that Linux has.
    """

    weights: int
    cache: int
    activations: int
    cameras: int
    runtime: int
    reserve: int
    building: int
    visible: int

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.activations + self.cameras + self.runtime

    @property
    def excess(self) -> int:
        """Bytes that it is over; negative where there is room."""
        return self.peak + self.reserve - self.visible

    @property
    def fits(self) -> bool:
        return self.excess <= 0

    @property
    def builds(self) -> bool:
        return self.building + self.reserve <= self.visible

    def record(self) -> dict[str, int]:
        return asdict(self)


def weight_bytes(part: Part, precision: Precision) -> int:
    """Of what one part stores: linear layers in the precision's bits, looked-up tables in those of all else."""
    apart = part.table + part.odd * precision.grouped
    return int(((part.stored - apart) * precision.bits + apart * precision.other) / 8)


def predict(work: Work, precision: Precision, device: Device, cameras: int, base: int = 0) -> Memory:
    """``base``: bytes of a process that has imported the runtime, of this machine's CPU."""
    sizes = [weight_bytes(part, precision) for part in work.parts]
    live = max(part.live for part in work.parts) * precision.activation
    cache = work.cached * precision.activation
    if device.sm is None:
        weights, arena = sum(sizes) + _widened(work, precision), _arena(work)
        return Memory(weights, cache, arena, 0, base + SESSION, 0, 0, device.visible_bytes)
    building = RUNTIME + WORKSPACE + BUILDING * max(sizes)
    return Memory(sum(sizes), cache, live, cameras * CAPTURE, RUNTIME, RESERVE, building, device.visible_bytes)


def _widened(work: Work, precision: Precision) -> int:
    """What ONNX Runtime makes of the file's weights at load and keeps beside them."""
    numbers = sum(part.stored - part.table for part in work.parts)
    if precision.widened is None:
        return 0
    return numbers * (4 if precision.widened == 32 else 1 + FOLDING)


def _arena(work: Work) -> int:
    """Of ONNX Runtime's activations, float32, with the scores of attention; it grows by doubling."""
    need = 4 * max(part.live + part.scores for part in work.parts)
    return 1 << max(need - 1, 0).bit_length()


def assumptions(device: Device) -> list[str]:
    if device.sm is None:
        return [f"ONNX Runtime on this machine: {SESSION // MIB} MiB beside the weights and the imported libraries"]
    return [
        f"{RUNTIME // MIB} MiB for the CUDA context, the engine's libraries and Python",
        f"{RESERVE // MIB} MiB for Linux without a desktop",
        f"{CAPTURE / 1e6:.1f} MB of capture buffers a camera",
        f"building an engine takes {BUILDING} times its graph's weights and {WORKSPACE // MIB} MiB, one at a time",
    ]
