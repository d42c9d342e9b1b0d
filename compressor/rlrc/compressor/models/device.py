"""Where torch computes: the option --device, and what the devices can do.

The choice applies to the whole process (``use``), like torch's number of threads and the precision of its products.
Functions compute where the weights and inputs are that they are given: stages move these to the device, and what they
made back to the CPU, where artifacts are written.
"""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from rlrc.errors import UserError

CPU = torch.device("cpu")
CHOICES = "auto, cpu, cuda, cuda:N or mps"

_chosen: torch.device | None = None


def use(option: str) -> torch.device:
    """Set the device of this process from now on. Raises UserError as ``pick``."""
    global _chosen
    _chosen = pick(option)
    if _chosen.type == "cuda":
        torch.cuda.set_device(_chosen)  # Accelerate takes the current one
    return _chosen


def current() -> torch.device:
    """The device of this process: the one in use, or that of the option auto."""
    return pick("auto") if _chosen is None else _chosen


def pick(option: str) -> torch.device:
    """The device that an option means here; auto: the accelerator that torch finds, or else the CPU.

    Each of several processes (``accelerate launch``) has a device of its own. Raises UserError for a device that this
    torch or this machine does not have.
    """
    if option == "cpu" or (option == "auto" and (_launched_on_cpu() or not torch.accelerator.is_available())):
        return CPU
    if option == "auto":
        found = torch.accelerator.current_accelerator()
        assert found is not None
        return _numbered(found.type, torch.accelerator.device_count())
    if not (match := re.fullmatch(r"(cuda)(?::(\d+))?|mps", option)):
        raise UserError(f"expected --device {CHOICES}, found {option!r}")
    if _launched_on_cpu():
        raise UserError(f"expected --device cpu or auto with accelerate launch --cpu, found {option}; leave out either")
    if option == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"expected a Mac's GPU for --device mps, found none; {_remedy('mps')}")
        return torch.device("mps")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found_text = f"none that torch {torch.__version__} can use" if built else f"cpu-only torch {torch.__version__}"
        raise UserError(f"expected a CUDA device for --device {option}, found {found_text}; {_remedy('cuda', built)}")
    count = torch.cuda.device_count()
    if match[2] is None:
        return _numbered("cuda", count)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"expected --device auto, cpu or cuda with several processes, found {option}; each takes one of its own"
        )
    if int(match[2]) >= count:
        raise UserError(f"expected --device from cuda:0 to cuda:{count - 1}, found {option}; this machine has {count}")
    return torch.device("cuda", int(match[2]))


def _remedy(kind: str, built: str | None = None) -> str:
    if kind == "mps":
        return "leave --device out, or give --device cpu"
    first = "see what nvidia-smi says" if built else "install a CUDA build of torch"
    return f"{first}, or give --device cpu"


def _launched_on_cpu() -> bool:
    """Whether ``accelerate launch --cpu`` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def _numbered(kind: str, count: int) -> torch.device:
    """The device of this process among those of the machine, as Accelerate takes it."""
    if kind == "mps":
        return torch.device(kind)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) % max(count, 1))


def describe(device: torch.device) -> str:
    """For the history: "cpu", or the type and the product's name, such as "cuda (NVIDIA H200)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def of_module(module: torch.nn.Module) -> torch.device:
    """The device of a module's weights. Those that layers compute from a source are not stored on any."""
    devices = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(devices, torch.device("meta"))


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From the host to a GPU without waiting for the work that the GPU has to do before."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and device.type not in ("cpu", "mps"))


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where there is none."""
    return torch.float32 if device.type == "mps" else torch.float64
