"""Which paths are checkpoints in an official format, for rlrc.compressor to open, and what may be said about them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlrc import foreign
from rlrc.errors import UserError
from rlrc.foreign import CONFIG, MANIFEST

# A name on the Hugging Face hub: owner/name or owner/name@revision.
REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class Flags:
    """What an official folder may not say itself."""

    hints: Path | None = None
    """a JSON file with geometry that an official folder's tensors do not tell, such as head counts"""
    unnorm_key: str | None = None
    """the data set whose statistics are meant, where an official folder has several"""
    tokenizer: Path | None = None
    """tokenizer.json, a sentencepiece model, or a folder with one of them, where an official folder has none"""
    images: int | None = None
    """how many pictures an OpenVLA-OFT checkpoint sees"""
    prompt_state: Literal["padded", "unpadded"] | None = None
    """whether the state in pi0.5's prompt is padded to max_state_dim numbers (LeRobot 0.4) or unpadded (0.5 and later),
    where an official folder does not say which LeRobot trained it"""


def checkpoint_folder(path: Path) -> Path:
    """The policy's folder: what the path names, or what holds a file of it, or lies in LeRobot's checkpoints/STEP."""
    if path.is_file() and (path.name == CONFIG or path.suffix == ".safetensors") and (path.parent / CONFIG).is_file():
        return path.parent
    inner = path / "pretrained_model"
    return inner if not (path / CONFIG).exists() and inner.is_dir() else path


def is_checkpoint(path: Path, flags: Flags) -> bool:
    """Whether it is an official folder or a repository of the hub. Raises UserError for flags that do not fit."""
    path = checkpoint_folder(path)
    if (path / MANIFEST).exists():
        if flags != Flags():
            raise UserError(
                "expected --hints, --unnorm-key, --tokenizer, --images and --prompt-state with an official checkpoint "
                f"only, found the artifact {path}; its manifest says all that"
            )
        return False
    if (path / CONFIG).exists() or foreign.is_adapter(path):
        return True
    missing = not path.exists() and not path.is_symlink()
    return missing and REPOSITORY.fullmatch(str(path)) is not None
