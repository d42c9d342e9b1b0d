"""Recognises what a path is - an artifact, a policy's checkpoint, something else - and advises on the last.

Recognised by the names of files and a few keys. Nothing is unpickled. Needs the standard library only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlrc.errors import UserError

CONFIG, MODEL, MANIFEST = "config.json", "model.safetensors", "manifest.json"
ADAPTERS = ("adapter_config.json", "lora_adapter/adapter_config.json")  # PEFT's, and where OpenVLA-OFT puts it
POINTER = b"version https://git-lfs"
# A name on the Hugging Face hub: owner/name or owner/name@revision.
REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
FILES = {  # by file extension: what the file is, and the advice
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


@dataclass(frozen=True)
class Flags:
    """What a checkpoint's own files may leave open."""

    hints: Path | None = None
    """a JSON file with geometry that a checkpoint's tensors do not show, such as head counts"""
    unnorm_key: str | None = None
    """which data set's statistics to use, where a checkpoint has several"""
    tokenizer: Path | None = None
    """tokenizer.json, a sentencepiece model, or a folder with one of them, where a checkpoint has none"""
    images: int | None = None
    """how many pictures an OpenVLA-OFT checkpoint takes"""
    prompt_state: Literal["padded", "unpadded"] | None = None
    """whether the state in pi0.5's prompt is padded to max_state_dim numbers (LeRobot 0.4) or unpadded (0.5 and later),
    where a checkpoint does not record which LeRobot trained it"""


def checkpoint_folder(path: Path) -> Path:
    """The policy's folder, given it, one of its files, or a step of a LeRobot training run (checkpoints/STEP)."""
    if path.is_file() and (path.name == CONFIG or path.suffix == ".safetensors") and (path.parent / CONFIG).is_file():
        return path.parent
    inner = path / "pretrained_model"
    return inner if not (path / CONFIG).exists() and inner.is_dir() else path


def is_checkpoint(path: Path, flags: Flags) -> bool:
    """Whether the path is an official checkpoint's folder or a repository on the hub, and not an artifact.

    Raises UserError for flags given with an artifact.
    """
    path = checkpoint_folder(path)
    if (path / MANIFEST).exists():
        if flags != Flags():
            raise UserError(
                "expected --hints, --unnorm-key, --tokenizer, --images and --prompt-state with an official checkpoint "
                f"only, found the artifact {path}; leave them out, the manifest has these values"
            )
        return False
    if (path / CONFIG).exists() or is_adapter(path):
        return True
    missing = not path.exists() and not path.is_symlink()
    return missing and REPOSITORY.fullmatch(str(path)) is not None


def describe_path(path: Path) -> str:
    """``what it is; what to do``, in one line, for the message about a path that cannot be used."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is missing; check the link"
    if not path.exists():
        return "nothing; check the path"
    if not path.is_dir():
        what, advice = FILES.get(path.suffix, ("a file", "give a folder"))
        return f"{what}; {advice}"
    for describe in KINDS:
        if (answer := describe(path)) is not None:
            return answer
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder; check the path"
    listed = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"a folder with {listed}; give an artifact, or a policy's folder with {CONFIG} and {MODEL}"


def is_pointer(path: Path) -> bool:
    """Whether the file is a Git LFS pointer to a large file that has not been fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def unreadable(expected: str, path: Path, reason: object, advice: str) -> UserError:
    """The error for a file that a library cannot read. For a Git LFS pointer it says to fetch the file."""
    if is_pointer(path):
        reason, advice = "a Git LFS pointer to it", "run git lfs pull there"
    return UserError(f"expected {expected} {path}, found: {reason}; {advice}")


def is_adapter(path: Path) -> bool:
    """Whether a folder holds only a PEFT adapter. Full weights next to an adapter already include it."""
    return any((path / name).is_file() for name in ADAPTERS) and not weight_files(path)


def weight_files(path: Path) -> list[Path]:
    """A folder's safetensors, in one file or in shards."""
    return sorted(path.glob("model*.safetensors"))


def _describe_artifact(path: Path) -> str | None:
    return f"an artifact; its {MANIFEST} describes it" if (path / MANIFEST).is_file() else None


def _describe_adapter(path: Path) -> str | None:
    if not is_adapter(path):
        return None
    file = next(path / name for name in ADAPTERS if (path / name).is_file())
    base = _read_object(file).get("base_model_name_or_path") or "a base model that it does not name"
    how = "merge_and_unload(), then save_pretrained()"
    if file.parent != path:
        how = "openvla-oft's vla-scripts/merge_lora_weights_and_save.py"
    return (
        f"a PEFT adapter of {base} without that model's weights, which rlrc does not support yet; merge it into its "
        f"base ({how}) and give that folder"
    )


def _describe_openpi(path: Path) -> str | None:
    """openpi's checkpoints: PyTorch's by the names of their tensors, JAX's by orbax's files."""
    if "type" not in _read_object(path / CONFIG):
        names = next(iter(map(_tensor_names, weight_files(path))), set())
        if any(name.startswith("paligemma_with_expert.") for name in names):
            family = "pi0.5" if "time_mlp_in.weight" in names else "pi0"
            return (
                f"{family} as openpi saves it (no lerobot type in {CONFIG}), which rlrc does not support yet; give the "
                "same policy in lerobot's format (type pi0 or pi05, with its processors)"
            )
    if any((path / name).is_dir() for name in ("params", "train_state")) and not (path / CONFIG).exists():
        return "a JAX checkpoint of openpi, which rlrc does not support; convert it to lerobot's format first"
    return None


def _describe_checkpoint(path: Path) -> str | None:
    if not (path / CONFIG).is_file():
        return None
    config = _read_object(path / CONFIG)
    kind = config.get("type") or config.get("model_type")
    called = f"a checkpoint of {kind!r}" if kind else f"a folder whose {path / CONFIG} has neither type nor model_type"
    if weight_files(path):
        if not kind:
            return f"{called}; is it a policy's folder?"
        return f"{called} in its training code's format; make an artifact of it first: rlrc prune {path} OUT --lossless"
    if pickled := [entry.name for entry in path.iterdir() if entry.suffix in (".bin", ".pth", ".ckpt")]:
        return f"{called} with pickled weights ({pickled[0]}); save them as safetensors with its training code"
    return f"{called} without weights; copy {MODEL} (or its index and shards) next to {CONFIG}"


def _describe_run(path: Path) -> str | None:
    """A training run, its folder of checkpoints, or one step of it."""
    if (path / "pretrained_model").is_dir():
        return f"a step of a LeRobot training run, with {describe_path(path / 'pretrained_model')}"
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
        return "the saved state of an interrupted stage; run that stage's command again to resume it"
    return None


def _describe_part(path: Path) -> str | None:
    """A data set, or one part of a policy without the others."""
    if (path / "meta" / "info.json").is_file():
        return "a LeRobotDataset, not a policy; give it as --data"
    if (shards := weight_files(path)) and not (path / CONFIG).exists():
        return f"weights ({shards[0].name}) without {CONFIG}; copy {CONFIG} from where they were saved"
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return "a tokenizer's folder; give the policy's folder, and this one as --tokenizer"
    if any(path.glob("*.onnx")) or any(path.glob("*.gguf")):
        return f"graphs without an artifact's {MANIFEST}; give the folder that rlrc export wrote"
    return None


KINDS: tuple[Callable[[Path], str | None], ...] = (
    _describe_artifact,
    _describe_adapter,
    _describe_openpi,
    _describe_checkpoint,
    _describe_run,
    _describe_part,
)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty for anything else."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _tensor_names(path: Path) -> set[str]:
    """Of a safetensors file; empty for a damaged one."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < path.stat().st_size else {}
    except (OSError, ValueError, RecursionError):
        return set()
    return set(header) - {"__metadata__"} if isinstance(header, dict) else set()
