"""A checkpoint folder: its configuration files, its tensors, and the options that complete them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rlrc.checkpoint_folder import CONFIG, Flags, describe_path, is_adapter
from rlrc.compressor.checkpoints import tensors as weights
from rlrc.compressor.models.storage import tensors as models_tensors
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.errors import UserError

HINTS = {  # the keys of a file of hints
    *("family", "prompt", "ignore", "tokenizer"),
    *("dinov2", "siglip", "image_size"),
    *("head", "robot", "num_actions_chunk", "normalization", "num_images_in_input", "use_proprio"),
    *("vision", "vlm", "expert", "text", "rms_eps", "vlm_rms_eps", "rope_theta", "rope_theta_used"),
}


@dataclass(frozen=True)
class ReadOptions:
    """Facts that a folder may lack.

    ``hints``: geometry that the shapes do not determine (see ``read_hints``); ``unnorm_key``: the data set whose
    statistics apply; ``images``: the number of pictures of OpenVLA-OFT; ``tokenizer``: a file, or a folder that holds
    one; ``prompt_state``: whether pi0.5's prompt pads the state; ``incomplete``: accept missing statistics, because the
    caller does not use them.
    """

    hints: Mapping[str, Any] = field(default_factory=dict)
    unnorm_key: str | None = None
    images: int | None = None
    tokenizer: Path | None = None
    prompt_state: str | None = None
    incomplete: bool = False


def options_of(flags: Flags) -> ReadOptions:
    """The options of the command line. Raises UserError for a file of hints that is missing or broken."""
    hints = {} if flags.hints is None else read_hints(flags.hints)
    return ReadOptions(hints, flags.unnorm_key, flags.images, flags.tokenizer, flags.prompt_state)


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder. ``virtual``: files in memory only, JSON values or Tensors (see geometry.py)."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    virtual: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        """Whether there is a file of this name."""
        return name in self.virtual or (self.path / str(name)).is_file()

    def json(self, name: str) -> Any:
        """The values of a JSON file. Raises UserError if it is missing or broken."""
        return self.virtual[name] if name in self.virtual else read_json(self.path / name)

    def safetensors(self, name: str) -> Tensors:
        """The tensors of a file other than the model's, such as a processor's state. Raises UserError without it."""
        if name in self.virtual:
            return cast(Tensors, self.virtual[name])
        if not (self.path / name).is_file():
            raise UserError(f"expected {name} in {self.path}, found none; copy that file too")
        return models_tensors.tensors_from_safetensors([self.path / name], str(self.path / name), name)

    def pt(self, pattern: str) -> Tensors | None:
        """The tensors of the one ``.pt`` whose name matches the pattern; None if no name does.

        ``Tensors.file`` is its name. Raises UserError if several match or if it holds anything but tensors.
        """
        names = sorted({path.name for path in self.path.glob(pattern)} | {n for n in self.virtual if _fits(n, pattern)})
        if len(names) > 1:
            raise UserError(
                f"expected one file {pattern} in {self.path}, found {', '.join(names)}; keep the files of one step"
            )
        if not names:
            return None
        return self.virtual[names[0]] if names[0] in self.virtual else weights.of_pt(self.path / names[0])


def open_folder(path: Path) -> Folder:
    """Reads config.json and the headers of the weights. Raises UserError for files that are missing or broken."""
    if not path.is_dir():
        raise UserError(f"expected a checkpoint's folder at {path}, found {describe_path(path)}")
    if is_adapter(path):
        raise UserError(f"expected a checkpoint with its weights at {path}, found {describe_path(path)}")
    if not (path / CONFIG).exists():
        missing = f"expected {path / CONFIG}, found: No such file or directory"
        raise UserError(f"{missing}; {path} is {describe_path(path)}")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"expected an object in {path / CONFIG}, found {type(config).__name__}; copy that file again")
    mark, root = NAMES.get(str(config.get("type") or config.get("model_type")), ("", ""))
    tensors = weights.of_model(path)
    weights.check_merged(tensors)
    return Folder(path, config, weights.strip_wrappers(tensors, mark, root))


def read_json(path: Path) -> Any:
    """The values of a JSON file. Raises UserError if it is missing or is not JSON.

    An integer of 19 digits or more becomes a float: no setting is that large, and longer integers overflow in torch.
    """
    try:
        return json.loads(path.read_bytes(), parse_int=lambda text: int(text) if len(text) < 19 else float(text))
    except OSError as error:
        raise UserError(f"expected {path}, found: {error.strerror}; copy that file too") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON in {path}, found: {error}; copy that file again") from None


def read_hints(path: Path) -> dict[str, Any]:
    """The keys of the sections ``geometry``, ``loader_hints`` and ``oft``, or the file's own keys without sections.

    ``tokenizer`` is a path relative to the file; a remark in brackets may follow it. Raises UserError for unknown keys.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"expected an object in {path}, found {type(values).__name__}; write keys with values")
    sections = [values[name] for name in ("geometry", "loader_hints", "oft") if isinstance(values.get(name), dict)]
    if unknown := sorted(values.keys() - HINTS) if not sections else ():
        close = difflib.get_close_matches(unknown[0], HINTS, 1)
        raise UserError(
            f"expected the hints {', '.join(sorted(HINTS))} in {path}, found {unknown[0]}"
            + (f"; did you mean {close[0]}?" if close else "; leave it out")
        )
    hints = {name: value for section in sections or [values] for name, value in section.items()}
    if isinstance(values.get("tokenizer"), str):
        hints["tokenizer"] = str(path.parent / values["tokenizer"].split(" (")[0])
    return hints


def _fits(name: str, pattern: str) -> bool:
    return Path(name).match(pattern)


# By type or model_type of config.json: a part of the names of a family's tensors, and the prefix of that part.
NAMES = {
    "openvla": ("language_model.", ""),
    "pi0": ("paligemma_with_expert.", "model."),
    "pi05": ("paligemma_with_expert.", "model."),
    "smolvla": ("vlm_with_expert.", "model."),
    "act": ("action_head.", "model."),
}
