"""What a path is that is not what was expected, and what can be done about it, for error messages.

Recognised by the names of files and a few keys. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlrc.errors import UserError

CONFIG, MODEL, MANIFEST = "config.json", "model.safetensors", "manifest.json"
ADAPTERS = ("adapter_config.json", "lora_adapter/adapter_config.json")  # PEFT's, and OpenVLA-OFT's place for it
POINTER = b"version https://git-lfs"
FILES = {  # what a file is by its ending, and the advice
    ".safetensors": ("weights without their folder", "give the folder that holds them and their config.json"),
    ".gguf": ("a GGUF file", "give the artifact's folder that it belongs to"),
    ".onnx": ("an ONNX graph", "give the artifact's folder that it belongs to"),
    ".json": ("a JSON file", "give the folder that holds it"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz"), ("an archive", "unpack it and give the folder")),
    **dict.fromkeys(
        (".pt", ".pth", ".ckpt", ".bin"),
        ("a pickled checkpoint, which rlrc does not open", "save the weights as safetensors with their training code"),
    ),
}


def found(path: Path) -> str:
    """``what it is; what to do``, in one line."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is missing; check the link"
    if not path.exists():
        return "nothing; check the path"
    if not path.is_dir():
        what, advice = FILES.get(path.suffix, ("a file", "give a folder"))
        return f"{what}; {advice}"
    for kind in KINDS:
        if (answer := kind(path)) is not None:
            return answer
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder; check the path"
    listed = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"a folder with {listed}; give an artifact, or a policy's folder with {CONFIG} and {MODEL}"


def is_pointer(path: Path) -> bool:
    """Whether a file stands for a large one that Git LFS has not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def unreadable(expected: str, path: Path, reason: object, advice: str) -> UserError:
    """Of a file that a library cannot read; a pointer of Git LFS gets the reason and the advice that it needs."""
    if is_pointer(path):
        reason, advice = "a Git LFS pointer to it", "run git lfs pull there"
    return UserError(f"expected {expected} {path}, found: {reason}; {advice}")


def is_adapter(path: Path) -> bool:
    """Whether a folder has a PEFT adapter alone. With whole weights there as well, it was merged into them."""
    return any((path / name).is_file() for name in ADAPTERS) and not weights_of(path)


def weights_of(path: Path) -> list[Path]:
    """A folder's safetensors, in one file or in shards."""
    return sorted(path.glob("model*.safetensors"))


def _artifact(path: Path) -> str | None:
    return f"an artifact; its {MANIFEST} says what it is" if (path / MANIFEST).is_file() else None


def _adapter(path: Path) -> str | None:
    if not is_adapter(path):
        return None
    file = next(path / name for name in ADAPTERS if (path / name).is_file())
    base = _object(file).get("base_model_name_or_path") or "a base model that it does not name"
    how = "merge_and_unload(), then save_pretrained()"
    if file.parent != path:
        how = "openvla-oft's vla-scripts/merge_lora_weights_and_save.py"
    return (
        f"a PEFT adapter of {base} without that model's weights, which rlrc does not support yet; merge it into its "
        f"base ({how}) and give that folder"
    )


def _openpi(path: Path) -> str | None:
    """openpi's checkpoints: PyTorch's by the names of their tensors, JAX's by orbax's files."""
    if "type" not in _object(path / CONFIG):
        names = next(iter(map(tensor_names, weights_of(path))), set())
        if any(name.startswith("paligemma_with_expert.") for name in names):
            family = "pi0.5" if "time_mlp_in.weight" in names else "pi0"
            return (
                f"{family} as openpi saves it (no lerobot type in {CONFIG}), which rlrc does not support yet; give the "
                "same policy in lerobot's format (type pi0 or pi05, with its processors)"
            )
    if any((path / name).is_dir() for name in ("params", "train_state")) and not (path / CONFIG).exists():
        return "a JAX checkpoint of openpi, which rlrc does not support; convert it to lerobot's format first"
    return None


def _official(path: Path) -> str | None:
    if not (path / CONFIG).is_file():
        return None
    config = _object(path / CONFIG)
    kind = config.get("type") or config.get("model_type")
    called = f"a checkpoint of {kind!r}" if kind else f"a folder whose {path / CONFIG} has neither type nor model_type"
    if weights_of(path):
        if not kind:
            return f"{called}; is it a policy's folder?"
        return f"{called} in its training code's format; make an artifact of it first: rlrc prune {path} OUT --lossless"
    if pickled := [entry.name for entry in path.iterdir() if entry.suffix in (".bin", ".pth", ".ckpt")]:
        return f"{called} with pickled weights ({pickled[0]}); save them as safetensors with its training code"
    return f"{called} without weights; copy {MODEL} (or its index and shards) next to {CONFIG}"


def _run(path: Path) -> str | None:
    """A training run, or the checkpoints of one, with steps to choose from; or one step."""
    if (path / "pretrained_model").is_dir():
        return f"a step of a LeRobot training run, with {found(path / 'pretrained_model')}"
    places = [path, path / "checkpoints"]
    steps = [step for place in places for step in sorted(place.glob("*/pretrained_model")) if step.is_dir()]
    if steps:
        listed = ", ".join(step.parent.name for step in steps[:8])
        return f"a LeRobot training run with the checkpoints {listed}; give one, such as {steps[-1].parent}"
    if (path / "training_state").is_dir() or path.name == "training_state":
        return "LeRobot's training state without the policy; give the folder pretrained_model next to it"
    if (path / "checkpoints").is_dir() and any((path / "checkpoints").glob("*.pt")):
        return (
            "a training run of OpenVLA or Prismatic in its own format; convert it to Hugging Face's with openvla's "
            "vla-scripts/extern/convert_openvla_weights_to_hf.py"
        )
    if (path / "stage.json").is_file():
        return "what an interrupted stage keeps; run the command of that stage again to go on"
    return None


def _parts(path: Path) -> str | None:
    if (path / "meta" / "info.json").is_file():
        return "a LeRobotDataset, not a policy; give it as --data"
    if (shards := weights_of(path)) and not (path / CONFIG).exists():
        return f"weights ({shards[0].name}) without {CONFIG}; copy {CONFIG} from where they were saved"
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return "a tokenizer's folder; give the policy's folder, and this one as --tokenizer"
    if any(path.glob("*.onnx")) or any(path.glob("*.gguf")):
        return f"graphs without an artifact's {MANIFEST}; give the folder that rlrc export wrote"
    return None


KINDS: tuple[Callable[[Path], str | None], ...] = (_artifact, _adapter, _openpi, _official, _run, _parts)


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def tensor_names(path: Path) -> set[str]:
    """Of a safetensors file; empty for a damaged one."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < path.stat().st_size else {}
    except (OSError, ValueError, RecursionError):
        return set()
    return set(header) - {"__metadata__"} if isinstance(header, dict) else set()
