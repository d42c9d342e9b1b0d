"""The folders of OpenVLA-OFT: the head, the number of pictures, the chunk, the state.

Neither config.json nor the weights state the number of pictures and the length of the chunk. FiLM and diffusion heads
are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlrc.artifact import PolicySpec
from rlrc.compressor.checkpoints.layout import Layout, TensorOrigin
from rlrc.compressor.checkpoints.prismatic import pictures
from rlrc.compressor.checkpoints.prismatic.layout import (
    LM_HEAD,
    Prismatic,
    action_tokens,
    affine,
    dimensions,
    prompt_spec,
)
from rlrc.compressor.checkpoints.prismatic.norm_stats import (
    BOUNDS,
    NARROWEST,
    STATISTICS,
    action_spec,
    data_sets,
    describe_statistics,
    normalisation,
    state_spec,
    statistics,
)
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.models.oft import FAMILY

ACTION_HEAD = "action_head--*.pt"
PROPRIO = "proprio_projector--*.pt"
DIFFUSION = "noisy_action_projector--*.pt"
FILM = "vision_backbone--*.pt"
BLOCKS = "model.mlp_resnet_blocks."
# The original code sets these on its command line: the chunk's length, and the bounds of actions and states.
ROBOTS = {"libero": (8, "bounds_q99"), "aloha": (25, "bounds"), "bridge": (5, "bounds_q99")}
HEADS = ("l1", "discrete")  # the hint "head"
FAMILIES = ("openvla", FAMILY)  # the hint "family"


def recognise(folder: Folder, options: ReadOptions) -> tuple[bool, tuple[str, ...]]:
    """Whether an OpenVLA folder is of OpenVLA-OFT, and the assumptions.

    Decides by the options, else by files that only OFT saves, else by the statistics; never by the folder's name. Both
    projects save dataset_statistics.json with a fine-tuned policy. OpenVLA does not load the robot's state
    (load_proprio=False in its RLDSDataset) and saves zeros of the action's length as ``proprio``; OFT always loads it.
    So ``proprio`` of another length means OFT; the same length decides nothing.
    """
    family = options.hints.get("family")
    if family not in (None, *FAMILIES):
        raise UserError(f"expected the hint family to be one of {', '.join(FAMILIES)}, found {family!r}; correct it")
    files = [found.file for pattern in (ACTION_HEAD, PROPRIO, DIFFUSION, FILM) if (found := folder.pt(pattern))]
    images = _requested_images(options)
    hinted = [key for key in ("robot", "num_actions_chunk", "head") if options.hints.get(key) is not None]
    hinted += ["images"] if isinstance(images, int) and images > 1 else []
    if family == FAMILIES[0] and (files or hinted):
        raise UserError(
            f"expected nothing of {FAMILY} in {folder.path} or the flags, as the hint family says {family}, found "
            f"{', '.join(files + hinted)}; leave one or the other out"
        )
    if family or files or hinted:
        return family != FAMILIES[0], ()
    if STATISTICS not in folder:
        return False, ()
    if any(_has_state(stats) for stats in data_sets(folder).values()):
        return True, ()
    return False, (f"{FAMILIES[0]}, not {FAMILY}, for it has none of the files of {FAMILY} (--hints family)",)


def _has_state(stats: Any) -> bool:
    """Whether a data set's statistics are of a state that was loaded: of another length than the action's, not zero."""
    sizes = []
    for key in ("action", "proprio"):
        part = stats.get(key) if isinstance(stats, Mapping) else None
        values = [value for value in part.values() if isinstance(value, list)] if isinstance(part, Mapping) else []
        sizes.append(len(values[0]) if values and any(map(any, values)) else 0)
    return sizes[1] not in (0, sizes[0])


def _steps(folder: Folder) -> None:
    """Raises UserError for heads and projectors of different training steps."""
    files = [found.file for pattern in (ACTION_HEAD, PROPRIO) if (found := folder.pt(pattern))]
    if len({re.sub(r"^.*--|_checkpoint|\.pt$", "", file) for file in files}) > 1:
        raise UserError(
            f"expected the heads of one training step in {folder.path}, found {' and '.join(files)}; keep the files of "
            "the step whose weights these are"
        )


def layout(folder: Folder, options: ReadOptions, shared: Prismatic) -> Layout:
    """The layout. Raises UserError for FiLM and diffusion, and for facts that neither folder nor options state."""
    _steps(folder)
    head, proprio = folder.pt(ACTION_HEAD), folder.pt(PROPRIO)
    diffusion = folder.pt(DIFFUSION) or (head and any(name.startswith("noise_predictor.") for name in head))
    if diffusion or folder.pt(FILM):
        raise UserError(
            f"expected an L1 head or tokens in {folder.path}, found {'a diffusion head' if diffusion else 'FiLM'}; "
            "rlrc does not support it"
        )
    _check_head(folder, options, head is not None)
    if options.hints.get("use_proprio") and proprio is None:
        raise UserError(f"expected {PROPRIO} in {folder.path}, as the hints say, found none; copy that file too")

    key, stats = statistics(folder, options)
    images, (horizon, bounds, assumed) = _images(folder, options, shared), _chunk(folder, options, key)
    norm = normalisation(stats, "action", bounds, NARROWEST)
    normalised = {"action": describe_statistics(folder, key, "action", bounds)}
    parts, unused, geometry = dict(shared.origins), list(shared.unused), dict(shared.geometry)
    if head is None:
        action = action_spec(horizon, norm, *action_tokens(folder))
        parts["head.weight"] = TensorOrigin((shared.head,))
    else:
        action = action_spec(horizon, norm)
        geometry["head"], geometry["head_blocks"] = dimensions(head, "model.fc1.weight", 2)[0], head.depth(BLOCKS)
        head.expect("model.fc2.weight", (action.dim, geometry["head"]))
        parts |= _head_parts(geometry["head_blocks"], head.file)
        unused += [LM_HEAD] if LM_HEAD in folder.tensors and LM_HEAD not in unused else []
    state = None
    if proprio is not None:
        state = state_spec(normalisation(stats, "proprio", bounds, NARROWEST, clip=1.0))
        normalised["state"] = describe_statistics(folder, key, "proprio", bounds)
        geometry["state"] = dimensions(proprio, "fc1.weight", 2)[0]
        proprio.expect("fc1.weight", (geometry["state"], len(state.names)))
        parts |= affine("state.0", "fc1", proprio.file) | affine("state.2", "fc2", proprio.file)

    elif options.hints.get("use_proprio") is None and _has_state(stats):
        assumed = (*assumed, f"no state, because there is no {PROPRIO} (--hints use_proprio)")

    cameras = tuple(replace(shared.camera, name=f"image{i}") for i in range(images))
    others = images * shared.tokens + (state is not None) + horizon * action.dim + 1
    prompt, guessed = prompt_spec(folder, options, others)
    spec = PolicySpec(FAMILY, "parallel", cameras, state, prompt, action, geometry)
    normalised |= pictures.describe_pictures(folder, cameras)
    return Layout(spec, shared.towers, parts, tuple(unused), assumed + guessed, normalised)


def _check_head(folder: Folder, options: ReadOptions, found: bool) -> None:
    """Raises UserError unless files or hints determine the head: the language model's weights do not."""
    hinted = options.hints.get("head")
    if hinted not in (None, *HEADS):
        raise UserError(f"expected the hint head to be one of {', '.join(HEADS)}, found {hinted!r}; correct it")
    if found and hinted == "discrete":
        raise UserError(f"expected no {ACTION_HEAD} in {folder.path}, as the hint head says, found one; correct it")
    if not found and hinted == "l1":
        raise UserError(f"expected {ACTION_HEAD} in {folder.path}, as the hints say, found none; copy that file too")
    if not found and hinted is None:
        raise UserError(
            f"expected {ACTION_HEAD} in {folder.path}, found none; copy that file too, or, if this {FAMILY} was "
            'trained to output tokens (no --use_l1_regression), give {"head": "discrete"} with --hints'
        )


def _requested_images(options: ReadOptions) -> Any:
    return options.hints.get("num_images_in_input") if options.images is None else options.images


def _images(folder: Folder, options: ReadOptions, shared: Prismatic) -> int:
    images = _requested_images(options)
    if images is None and "vision2" not in shared.towers:
        return 1  # the original code takes several with fused vision backbones only
    if not isinstance(images, int) or images < 1:
        raise UserError(
            f"expected the number of pictures that {folder.path} was trained with, found "
            f"{'none' if images is None else images} (the weights do not say); give --images 1, 2 or 3"
        )
    return images


def _chunk(folder: Folder, options: ReadOptions, dataset: str) -> tuple[int, str, tuple[str, ...]]:
    """The chunk's length, the kind of bounds, and the assumptions.

    From the hints, else from the robot whose name is a word of the data set's name.
    """
    robot = options.hints.get("robot")
    words = {word for word in re.split("[^a-z]+", str(robot or dataset).lower()) if word in ROBOTS}
    if robot is not None and len(words) != 1:
        raise UserError(f"expected the hint robot to be one of {', '.join(ROBOTS)}, found {robot!r}; correct it")
    usual = ROBOTS[words.pop()] if len(words) == 1 else (None, "bounds_q99")
    horizon = options.hints.get("num_actions_chunk", usual[0])
    bounds = options.hints.get("normalization", usual[1])
    if not isinstance(horizon, int) or horizon < 1 or str(bounds) not in BOUNDS:
        raise UserError(
            f"expected the chunk's length of {folder.path}, found {horizon or 'none'} with {bounds} (the weights and "
            f"the data set's name {dataset!r} do not say); give num_actions_chunk, and normalization "
            f"({' or '.join(BOUNDS)}), with --hints"
        )
    values = {"num_actions_chunk": f"chunks of {horizon} actions", "normalization": f"normalisation by {bounds}"}
    guessed = {} if robot else {key: text for key, text in values.items() if key not in options.hints}
    why = f"by the name of its data set, {dataset!r}" if usual[0] else "as usual"
    return horizon, bounds, tuple(f"{text}, {why} (--hints {key})" for key, text in guessed.items())


def _head_parts(blocks: int, file: str) -> dict[str, TensorOrigin]:
    names = {"norm1": "layer_norm1", "input": "fc1", "norm2": "layer_norm2", "output": "fc2"}
    for i in range(blocks):
        block = f"{BLOCKS.removeprefix('model.')}{i}.ffn"
        names |= {f"blocks.{i}.0": f"{block}.0", f"blocks.{i}.1": f"{block}.1"}
    parts = dict[str, TensorOrigin]()
    for ours, theirs in names.items():
        parts |= affine(f"head.{ours}", f"model.{theirs}", file)
    return parts
