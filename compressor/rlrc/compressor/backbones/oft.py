"""OpenVLA-OFT (arXiv 2502.19645): OpenVLA fine-tuned to give a whole chunk from one pass over several pictures.

Sequence: first token, the patches of all pictures, the state if there is one, the rest of the prompt, a zero vector for
every number of the chunk, </s>; everything sees everything. Each number is made of the hidden state one place before
its own, as next tokens are: by an MLP that takes all of a time step's (trained with an L1 loss), or as a token. FiLM
and diffusion heads are recognised and refused.

Neither config.json nor the weights tell how many pictures there are and how long the chunk is.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor import decode
from rlrc.compressor.backbones.norm_stats import (
    BOUNDS,
    NARROWEST,
    action_spec,
    described,
    described_pictures,
    normalisation,
    state_spec,
    statistics,
)
from rlrc.compressor.backbones.prismatic import (
    LM_HEAD,
    Prismatic,
    action_tokens,
    affine,
    dimensions,
    path_names,
    prompt_spec,
)
from rlrc.compressor.nn.decoder import additive
from rlrc.compressor.nn.prismatic import PrismaticPolicy, gelu_mlp
from rlrc.compressor.policy import Inputs, Layout, Outputs, Part
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.official import Folder, Options

FAMILY = "openvla-oft"
STOP = 2  # </s>

ACTION_HEAD = "action_head--*.pt"
PROPRIO = "proprio_projector--*.pt"
DIFFUSION = "noisy_action_projector--*.pt"
FILM = "vision_backbone--*.pt"
BLOCKS = "model.mlp_resnet_blocks."

# What the official code chooses by its command line: the chunk's length, and which bounds actions and states have.
ROBOTS = {"libero": (8, "bounds_q99"), "aloha": (25, "bounds"), "bridge": (5, "bounds_q99")}


def recognise(folder: Folder, options: Options) -> bool:
    """Whether an OpenVLA folder is OpenVLA-OFT's: by its files, by its name, or by what the options say of it.

    One without extra files that sees one picture is the same as OpenVLA's own but for its name: hints tell.
    """
    files = any(folder.pt(pattern) is not None for pattern in (ACTION_HEAD, PROPRIO, DIFFUSION, FILM))
    named = re.search(r"(?<![a-z])oft(?![a-z])", path_names(folder)) is not None
    said = any(options.hints.get(key) is not None for key in ("robot", "num_actions_chunk", "head"))
    images = _told_images(options)
    return files or named or said or (isinstance(images, int) and images > 1)


def layout(folder: Folder, options: Options, shared: Prismatic) -> Layout:
    """Raises UserError for FiLM and diffusion, and for what neither the folder nor the options tell."""
    head, proprio = folder.pt(ACTION_HEAD), folder.pt(PROPRIO)
    diffusion = folder.pt(DIFFUSION) or (head and any(name.startswith("noise_predictor.") for name in head))
    if diffusion or folder.pt(FILM):
        raise UserError(
            f"expected an L1 head or tokens in {folder.path}, found {'a diffusion head' if diffusion else 'FiLM'}; "
            "rlrc does not run that"
        )
    said = {ACTION_HEAD: options.hints.get("head") == "l1", PROPRIO: options.hints.get("use_proprio")}
    for name, file in ((ACTION_HEAD, head), (PROPRIO, proprio)):
        if said[name] and file is None:
            raise UserError(f"expected {name} in {folder.path}, as the hints say, found none; copy that file too")

    key, stats = statistics(folder, options)
    images, (horizon, bounds) = _images(folder, options, shared), _chunk(folder, options, key)
    norm = normalisation(stats, "action", bounds, NARROWEST)
    shown = {"action": described(folder, key, "action", bounds)}
    parts, unused, geometry = dict(shared.parts), list(shared.unused), dict(shared.geometry)
    if head is None:
        action = action_spec(horizon, norm, *action_tokens(folder))
        parts["head.weight"] = Part((LM_HEAD,))
    else:
        action = action_spec(horizon, norm)
        geometry["head"], geometry["head_blocks"] = dimensions(head, "model.fc1.weight", 2)[0], head.depth(BLOCKS)
        head.expect("model.fc2.weight", (action.dim, geometry["head"]))
        parts |= _head_parts(geometry["head_blocks"], head.file)
        unused.append(LM_HEAD)
    state = None
    if proprio is not None:
        state = state_spec(normalisation(stats, "proprio", bounds, NARROWEST, clip=1.0))
        shown["state"] = described(folder, key, "proprio", bounds)
        geometry["state"] = dimensions(proprio, "fc1.weight", 2)[0]
        proprio.expect("fc1.weight", (geometry["state"], len(state.names)))
        parts |= affine("state.0", "fc1", proprio.file) | affine("state.2", "fc2", proprio.file)

    cameras = tuple(replace(shared.camera, name=f"image{i}") for i in range(images))
    others = images * shared.tokens + (state is not None) + horizon * action.dim + 1
    spec = PolicySpec(FAMILY, "parallel", cameras, state, prompt_spec(folder, others), action, geometry)
    return Layout(spec, shared.towers, parts, tuple(unused), normalisation=described_pictures(cameras) | shown)


def _told_images(options: Options) -> Any:
    return options.hints.get("num_images_in_input") if options.images is None else options.images


def _images(folder: Folder, options: Options, shared: Prismatic) -> int:
    images = _told_images(options)
    if images is None and "vision2" not in shared.towers:
        return 1  # the official code takes several with fused vision backbones only
    if not isinstance(images, int) or images < 1:
        raise UserError(
            f"expected the number of pictures that {folder.path} was trained with, found "
            f"{'none' if images is None else images} (the weights do not tell); give --images 1, 2 or 3"
        )
    return images


def _chunk(folder: Folder, options: Options, dataset: str) -> tuple[int, str]:
    """The chunk's length, and the kind of bounds: from the hints, or else the robot's that a name tells."""
    names = (str(options.hints.get("robot", "")), dataset, path_names(folder))
    robot = next((robot for name in names for robot in ROBOTS if robot in name.lower()), None)
    horizon, bounds = ROBOTS[robot] if robot else (None, "bounds_q99")
    horizon, bounds = options.hints.get("num_actions_chunk", horizon), options.hints.get("normalization", bounds)
    if not isinstance(horizon, int) or horizon < 1 or bounds not in BOUNDS:
        raise UserError(
            f"expected the chunk's length of {folder.path}, found {horizon or 'none'} with {bounds} (the weights and "
            f"the data set's name {dataset!r} do not tell); give num_actions_chunk, and normalization "
            f"({' or '.join(BOUNDS)}), with --hints"
        )
    return horizon, bounds


def _head_parts(blocks: int, file: str) -> dict[str, Part]:
    names = {"norm1": "layer_norm1", "input": "fc1", "norm2": "layer_norm2", "output": "fc2"}
    for i in range(blocks):
        block = f"{BLOCKS.removeprefix('model.')}{i}.ffn"
        names |= {f"blocks.{i}.0": f"{block}.0", f"blocks.{i}.1": f"{block}.1"}
    parts = dict[str, Part]()
    for ours, official in names.items():
        parts |= affine(f"head.{ours}", f"model.{official}", file)
    return parts


class RegressionHead(nn.Module):
    """Hidden states of a time step (..., inputs) -> its action (..., dim): an MLP with residual blocks."""

    def __init__(self, inputs: int, width: int, blocks: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs)
        self.input = nn.Linear(inputs, width)
        block = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(blocks)]
        self.blocks = nn.ModuleList(block)
        self.norm2 = nn.LayerNorm(width)
        self.output = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.input(self.norm1(x)))
        for block in self.blocks:
            x = x + block(x)
        return self.output(self.norm2(x))


class OFTPolicy(PrismaticPolicy):
    """(pictures, ids, state) -> a chunk, in one pass."""

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__(spec, towers)
        action, width, geometry = spec.action, towers["decoder"].width, self.geometry
        self.state = gelu_mlp(len(spec.state.names), geometry.state, width) if spec.state else None
        if action.tokens is None:
            self.head: nn.Module = RegressionHead(action.dim * width, geometry.head, geometry.head_blocks, action.dim)
        else:
            self.head = nn.Linear(width, action.tokens.rows, bias=False)

    def sequence(self, image_tokens: Tensor, ids: Tensor, state: Tensor | None) -> Tensor:
        """What the decoder takes (B, T, width); the chunk's places are the last but one."""
        words, chunk = self.embedding(ids), self.spec.action.horizon * self.spec.action.dim
        felt = list[Tensor]()
        if self.state is not None:
            assert state is not None
            felt.append(self.state(state.to(words.dtype))[:, None])
        empty, stop = (
            words.new_zeros(len(ids), chunk, words.shape[-1]),
            self.embedding(ids.new_full((len(ids), 1), STOP)),
        )
        parts = [words[:, :1], image_tokens, *felt, words[:, 1:], empty, stop]
        return torch.cat([part.to(words.dtype) for part in parts], 1)

    def hidden(self, image_tokens: Tensor, ids: Tensor, mask: Tensor | None, state: Tensor | None) -> Tensor:
        """Hidden states of the chunk's numbers (B, horizon * dim, width)."""
        x, chunk = self.sequence(image_tokens, ids, state), self.spec.action.horizon * self.spec.action.dim
        first = x.shape[1] - 1 - chunk  # the first of the chunk's places
        if mask is None:
            return self.decoder(x)[:, first - 1 : first - 1 + chunk]
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        real[:, first - ids.shape[1] + 1 : first] = mask[:, 1:]
        y = self.decoder(x, additive(real)[:, None, None].to(x), real.cumsum(1) - 1)
        # Padding stands between the prompt's last token and the chunk's places.
        last = y[torch.arange(len(y), device=y.device), first - 1 - (~mask).sum(1)]
        return torch.cat([last[:, None], y[:, first : first + chunk - 1]], 1)

    def decode(self, image_tokens: Tensor, ids: Tensor | None, mask: Tensor | None, state: Tensor | None) -> Tensor:
        """The parallel driver's: logits (B, horizon, dim, rows), or normalised actions (B, horizon, dim)."""
        assert ids is not None
        action, hidden = self.spec.action, self.hidden(image_tokens, ids, mask, state)
        if action.tokens is None:
            return self.head(hidden.unflatten(1, (action.horizon, action.dim)).flatten(2)).float()
        return self.head(hidden).float().unflatten(1, (action.horizon, action.dim))

    def act(self, inputs: Inputs) -> Outputs:
        return decode.parallel(self, inputs)
