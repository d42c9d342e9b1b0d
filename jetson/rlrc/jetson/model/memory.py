"""Peak memory of a running policy: on a Jetson, where GPU and Linux share it, and on this machine's CPU.

Every empirical constant is named here and listed in the plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rlrc.artifact.precisions import Precision
from rlrc.jetson.model.devices import Device
from rlrc.jetson.model.work import DecisionWork, Part

MIB = 2**20
RUNTIME = 350 * MIB  # CUDA context, the engine's libraries, Python with numpy
RESERVE = 1024 * MIB  # Linux, drivers and services of a Jetson without a desktop
CAPTURE = 4 * 1280 * 720 * 2  # of a camera: four buffers of 1280 x 720 pixels in YUV 4:2:2
BUILDING = 3  # copies of a graph's weights while its engine is built: parsed, being optimised, serialized
WORKSPACE = 512 * MIB  # of the engine builder

# ONNX Runtime on a CPU, measured with rlrc bench memory (docs/decisions). SESSION: growth of a process between import
# and run, without weights. FOLDING: bytes that remain for each weight after 4-bit integers are folded to 8 bits. LARGE:
# larger tensors are returned to the system after they are widened. LEFT: the part of them that stays allocated.
SESSION = 24 * MIB
FOLDING = 34
LARGE = MIB
LEFT = 0.25


@dataclass(frozen=True)
class PeakMemory:
    """Bytes. ``building``: the peak while engines are built on the device, one graph at a time; 0 if none is built.

    ``reserve``: memory of Linux and its services; ``visible``: all memory that Linux has.
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
        """Bytes above the limit; negative if there is room."""
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
    """Stored bytes of a part: linear layers in the precision's bits, tables and incomplete groups in its other bits."""
    apart = part.table + part.ungrouped(precision.group)
    return int(((part.stored - apart) * precision.bits + apart * precision.other) / 8)


def predict(work: DecisionWork, precision: Precision, device: Device, cameras: int, base: int = 0) -> PeakMemory:
    """``base``: resident bytes of a process that has imported the runtime, for a CPU."""
    sizes = [weight_bytes(part, precision) for part in work.parts]
    live = max(part.live for part in work.parts) * precision.activation
    cache = work.cached * precision.activation
    if device.sm is None:
        weights = _resident(work, precision)
        return PeakMemory(weights, cache, _live(work), 0, base + SESSION, 0, 0, device.visible_bytes)
    building = RUNTIME + WORKSPACE + BUILDING * max(sizes)
    return PeakMemory(sum(sizes), cache, live, cameras * CAPTURE, RUNTIME, RESERVE, building, device.visible_bytes)


def _resident(work: DecisionWork, precision: Precision) -> int:
    """Weights of ONNX Runtime: those of the file, or those widened at load plus the part of the file that it keeps."""
    stored = [op.weights * precision.bits / 8 for part in work.parts if part.stored for op in part.ops]
    large = sum(size for size in stored if size > LARGE)
    tables = [part.table * precision.other / 8 for part in work.parts]
    file = sum(weight_bytes(part, precision) for part in work.parts)
    left = int(LEFT * (large + sum(size for size in tables if size > LARGE)))
    numbers = sum(part.stored - part.table for part in work.parts)
    if precision.widened is None:
        return file + left
    if precision.widened == 8:
        return file + left + numbers * (1 + FOLDING)
    return file - int(large) + left + numbers * 4


def _live(work: DecisionWork) -> int:
    """Activations of ONNX Runtime in float32, attention scores included."""
    return 4 * max(part.live + part.scores for part in work.parts)


def assumptions(device: Device) -> list[str]:
    if device.sm is None:
        return [
            f"ONNX Runtime on this machine: {SESSION // MIB} MiB in addition to the weights and the imported libraries"
        ]
    return [
        f"{RUNTIME // MIB} MiB for the CUDA context, the engine's libraries and Python",
        f"{RESERVE // MIB} MiB for Linux without a desktop",
        f"{CAPTURE / 1e6:.1f} MB of capture buffers for each camera",
        f"building an engine takes {BUILDING} times its graph's weights and {WORKSPACE // MIB} MiB, one at a time",
    ]
