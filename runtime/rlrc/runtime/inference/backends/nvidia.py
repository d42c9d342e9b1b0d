"""Access to NVIDIA's driver and TensorRT. Needs the standard library only.

The driver is checked before TensorRT is imported: without a driver, TensorRT may end the process.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from typing import Any

from rlrc.artifact.build_plan import BuildPlan
from rlrc.errors import UserError

DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def runs_tensorrt() -> bool:
    """Whether this machine has a GPU with a driver, and TensorRT's module, which is not imported."""
    try:
        device_sm()
    except UserError:
        return False
    return importlib.util.find_spec("tensorrt") is not None


def device_sm() -> int:
    """Compute capability of the first GPU, 87 for 8.7. Raises UserError without a driver or a GPU."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise UserError(f"expected NVIDIA's driver ({DRIVER}), found none; run this on the device itself") from None
    if (code := driver.cuInit(0)) != 0:
        raise UserError(f"expected a working GPU, found error {code} of cuInit; see nvidia-smi or dmesg")
    numbers = [ctypes.c_int() for _ in (MAJOR, MINOR)]
    for number, attribute in zip(numbers, (MAJOR, MINOR), strict=True):
        if (code := driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)) != 0:
            raise UserError(f"expected a GPU, found error {code} of cuDeviceGetAttribute; see nvidia-smi or dmesg")
    return numbers[0].value * 10 + numbers[1].value


def check_sm(plan: BuildPlan, sm: int) -> None:
    if sm < plan.least_sm:
        raise UserError(
            f"expected a GPU of SM {_dotted(plan.least_sm)} or later for {plan.precision}, found SM {_dotted(sm)}; "
            "export the artifact with another --precision"
        )


def _dotted(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"


def import_tensorrt() -> Any:
    """TensorRT's module. Raises UserError if it cannot be imported."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise UserError(
            f"expected the module tensorrt, found: {error}; JetPack installs it for the system's Python: create "
            "the environment with --system-site-packages"
        ) from None


def check_version(trt: Any, plan: BuildPlan) -> None:
    """Raises UserError if TensorRT is older than the plan needs.

    TensorRT-RTX numbers its releases from 1.0; its first one reads what TensorRT 10.3 does.
    """
    rtx = "rtx" in trt.__name__
    if not rtx and parse_version(trt.__version__) < parse_version(plan.tensorrt):
        raise UserError(
            f"expected TensorRT {plan.tensorrt} or later for these graphs, found {trt.__version__}; upgrade JetPack"
        )


def parse_version(version: str) -> tuple[int, ...]:
    """The version 10.3.0.26 -> (10, 3, 0, 26)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps the last errors, as ``errors``, for the message to the user."""

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(text)
                del self.errors[:-3]

    return Log()
