"""Operations and bytes of one decision, part by part, computed from the policy's description alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.errors import UserError
from rlrc.jetson.model.operations import (
    Op,
    decoder_block,
    detr_block,
    elementwise,
    linear,
    mlp,
    resnet,
    stack,
    vision_block,
)

PROMPT = 32  # assumed tokens of an instruction with its template
ONE_CAMERA = ("tiny", "openvla")
STATE_TOKENS = 4  # tokens for each number of the state in the prompt: three digits and a blank


@dataclass(frozen=True)
class Part:
    """One part of a decision. It runs ``times`` times and reads its weights each time.

    ``stored``: numbers of its weights in memory, 0 if an earlier part has stored them. ``table``: of those, the numbers
    that are looked up and not multiplied (word embeddings). ``live``: the largest number of activations in memory at
    once, without ``scores`` (see Op).
    """

    name: str
    ops: tuple[Op, ...]
    times: int = 1
    stored: int = 0
    table: int = 0
    live: int = 0
    scores: int = 0

    def ungrouped(self, group: int) -> int:
        """Stored weights that fill no whole groups of so many inputs."""
        return sum(op.ungrouped(group) for op in self.ops) if self.stored else 0

    @property
    def flops(self) -> float:
        return self.times * sum(op.flops for op in self.ops)


@dataclass(frozen=True)
class DecisionWork:
    """``parts`` in the order of execution; ``cached``: numbers in the key/value cache."""

    parts: tuple[Part, ...]
    cached: int
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """Inputs and settings of a decision that replace those of the policy's description."""

    cameras: int | None = None
    prompt_tokens: int | None = None
    steps: int | None = None
    horizon: int | None = None


def work(policy: PolicySpec, towers: dict[str, TowerSpec], load: Load | None = None) -> DecisionWork:
    """The work of one decision. Raises UserError for an unknown family and for a load that does not fit the policy."""
    policy = _loaded(policy, load or Load())
    if policy.family not in FAMILIES:
        raise UserError(f"expected one of the families {', '.join(FAMILIES)}, found {policy.family!r}; upgrade rlrc")
    words, notes = _words(policy, (load or Load()).prompt_tokens)
    parts, cached = FAMILIES[policy.family](policy, towers, words)
    cameras = len(policy.cameras)
    pictures = f"{cameras} camera{'s' * (cameras > 1)} of {policy.cameras[0].height} x {policy.cameras[0].width} pixels"
    assumed = [pictures, *notes]
    if policy.flow is not None:
        assumed.append(f"{policy.flow.steps} flow steps of a chunk of {policy.action.horizon}")
    return DecisionWork(tuple(parts), cached, tuple(assumed))


def _loaded(policy: PolicySpec, load: Load) -> PolicySpec:
    for name, number in (("cameras", load.cameras), ("prompt tokens", load.prompt_tokens), ("steps", load.steps)):
        if number is not None and number < 1:
            raise UserError(f"expected one or more {name}, found {number}; leave it out for the policy's own")
    if load.cameras is not None:
        if policy.family in ONE_CAMERA and load.cameras > 1:
            raise UserError(f"expected one camera for family {policy.family}, found {load.cameras}; leave it out")
        policy = replace(policy, cameras=(policy.cameras * load.cameras)[: load.cameras])
    if load.steps is not None:
        if policy.flow is None:
            raise UserError(f"expected no steps for {policy.decode} decoding, found {load.steps}; leave them out")
        policy = replace(policy, flow=replace(policy.flow, steps=load.steps))
    if load.horizon is not None:
        policy = replace(policy, action=replace(policy.action, horizon=load.horizon))
    return policy


def _words(policy: PolicySpec, given: int | None) -> tuple[int, list[str]]:
    """Number of prompt tokens, and the note about it."""
    prompt = policy.prompt
    if prompt is None:
        return 0, []
    if given is not None:
        return given, [f"{given} prompt tokens, as asked"]
    if prompt.pad_id is not None:
        return prompt.max_tokens, [f"{prompt.max_tokens} prompt tokens, padded"]
    numbers = (
        STATE_TOKENS * max(len(policy.state.names), prompt.state_width) if prompt.state_bins and policy.state else 0
    )
    tokens = min(PROMPT + numbers, prompt.max_tokens)
    state = f", {numbers} of them for the state" if numbers else ""
    return tokens, [f"{tokens} prompt tokens{state} (assumed; --prompt-tokens)"]


def _part(name: str, operations: Iterable[Op], times: int = 1, table: int = 0, shared: bool = False) -> Part:
    ops = tuple(operations)
    stored = 0 if shared else sum(op.weights for op in ops) + table
    # Inputs and outputs of an operation are in memory at the same time.
    live = 2 * max((op.activations for op in ops), default=0)
    scores = max((op.scores for op in ops), default=0)
    return Part(name, ops, times, stored, table, live, scores)


def _vision(towers: dict[str, TowerSpec], name: str, patch: int, rows: int, pictures: int, extra: int = 0) -> list[Op]:
    tower = towers[name]
    ops = [linear(rows * pictures, 3 * patch**2, tower.width), elementwise(rows * pictures, tower.width)]
    for layer in tower.layers:
        ops += vision_block(tower, layer, rows + extra, pictures)
    return ops


def _prismatic(policy: PolicySpec, towers: dict[str, TowerSpec], words: int) -> tuple[list[Part], int]:
    """OpenVLA, one token in each pass, and OpenVLA-OFT, a chunk in one pass."""
    g, camera, pictures, tower = policy.geometry, policy.cameras[0], len(policy.cameras), towers["decoder"]
    tokens = (camera.height // g["patch"]) * (camera.width // g["patch"])
    names = [name for name in ("vision", "vision2") if name in towers]
    ops = []
    for name, extra in zip(names, g["extra"], strict=False):
        ops += _vision(towers, name, g["patch"], tokens, pictures, extra)
    ops += mlp(tokens * pictures, [sum(towers[name].width for name in names), *g["projector"]])
    action, numbers = policy.action, policy.action.horizon * policy.action.dim
    embedding = g["vocabulary"] * tower.width
    if policy.decode == "autoregressive":
        assert action.tokens is not None
        length, head = pictures * tokens + words, action.tokens.rows
        prefill = [*stack(tower, length, length, 1), linear(1, tower.width, head)]
        decode = [*stack(tower, 1, length + numbers // 2, 1), linear(1, tower.width, head)]
        parts = [
            _part("vision", ops),
            _part("prefill", prefill, table=embedding),
            _part("decode", decode, numbers - 1, shared=True),
        ]
        return parts, _cache(tower, length + numbers)
    length = pictures * tokens + (policy.state is not None) + words + numbers + 1
    whole = list(stack(tower, length, length, numbers + 2))
    if policy.state is not None:
        whole += mlp(1, [len(policy.state.names), g["state"], tower.width])
    if action.tokens is not None:
        head_ops = [linear(numbers, tower.width, action.tokens.rows)]
    else:
        rows, hidden = action.horizon, g["head"]
        head_ops = mlp(rows, [action.dim * tower.width, *[hidden] * (1 + g["head_blocks"]), action.dim])
    return [_part("vision", ops), _part("prefill", whole, table=embedding), _part("head", head_ops)], 0


def _flow(policy: PolicySpec, towers: dict[str, TowerSpec], words: int) -> tuple[list[Part], int]:
    """pi0, pi0.5, SmolVLA: a prefix once, an expert for every step."""
    g, camera, pictures, flow = policy.geometry, policy.cameras[0], len(policy.cameras), policy.flow
    assert flow is not None
    vision, tower, expert = towers["vision"], towers["decoder"], towers["expert"]
    patches, squares = (camera.height // g["patch"]) * (camera.width // g["patch"]), g["merge"] ** 2
    tokens = patches // squares
    vision_ops = _vision(towers, "vision", g["patch"], patches, pictures)
    vision_ops += [elementwise(patches * pictures, vision.width, 2 * vision.width)]
    vision_ops += [linear(tokens * pictures, vision.width * squares, tower.width)]
    numbers = 0 if policy.state is None else policy.state.width or len(policy.state.names)
    length = pictures * tokens + words + (g["state"] == "prefix")
    prefix = list(stack(tower, length, length, length))
    prefix += [linear(1, numbers, tower.width)] if g["state"] == "prefix" else []

    rows, width = policy.action.horizon + (g["state"] == "suffix"), expert.width
    source = tower.layers[0].kv_heads * tower.layers[0].head_dim
    step = [linear(policy.action.horizon, flow.width, width)]
    step += [linear(1, numbers, width)] if g["state"] == "suffix" else []
    if not expert.tabulated:
        once = expert.norm == "adaptive"
        step += mlp(1 if once else policy.action.horizon, [width if once else 2 * width, width, width])
    for layer in expert.layers:
        keys = length + rows * (layer.kind != "cross")
        step += decoder_block(expert, layer, rows, keys, rows, source)
    step += [elementwise(rows, width, width), linear(policy.action.horizon, width, flow.width)]
    parts = [
        _part("vision", vision_ops),
        _part("prefix", prefix, table=g["vocabulary"] * tower.width),
        _part("steps", step, flow.steps),
    ]
    return parts, _cache(tower, length)


def _tiny(policy: PolicySpec, towers: dict[str, TowerSpec], words: int) -> tuple[list[Part], int]:
    """The reference family: a stem that joins neighbours step by step, and one parallel pass."""
    g, camera, vision, tower = policy.geometry, policy.cameras[0], towers["vision"], towers["decoder"]
    pixels, channels, vision_ops = camera.height * camera.width, 3, list[Op]()
    for factor, width in zip(g["stem_factors"], [*g["stem_widths"], vision.width], strict=True):
        pixels, inputs = pixels // factor**2, channels * factor**2
        vision_ops += [linear(pixels, inputs, width), elementwise(pixels, width)]
        channels = width
    for layer in vision.layers:
        vision_ops += vision_block(vision, layer, pixels, 1)
    squares = g["merge"] ** 2
    tokens = pixels // squares
    vision_ops += [
        elementwise(pixels, vision.width, 2 * vision.width),
        linear(tokens, vision.width * squares, tower.width),
    ]
    assert policy.state is not None
    length, horizon = tokens + words + 1 + policy.action.horizon, policy.action.horizon
    whole = [linear(1, len(policy.state.names), tower.width), *stack(tower, length, length, horizon)]
    head = [linear(horizon, tower.width, policy.action.dim * policy.action.bins)]
    return [
        _part("vision", vision_ops),
        _part("prefill", whole, table=g["vocabulary"] * tower.width),
        _part("head", head),
    ], 0


def _act(policy: PolicySpec, towers: dict[str, TowerSpec], words: int) -> tuple[list[Part], int]:
    """ACT: a ResNet for each camera, an encoder, and a decoder with one query for each step."""
    g, width = policy.geometry, towers["encoder"].width
    vision_ops, positions = list[Op](), 1 + bool(g["state"]) + bool(g["environment"])
    for i, camera in enumerate(policy.cameras):
        found, (rows, columns) = resnet(g, camera.height, camera.width)
        found.append(linear(rows * columns, g["outputs"][-1], width))
        vision_ops += found if i == 0 else [replace(op, weights=0) for op in found]
        positions += rows * columns
    whole = [linear(1, inputs, width) for inputs in (g["state"], g["environment"]) if inputs]
    for layer in towers["encoder"].layers:
        whole += detr_block(towers["encoder"], layer, positions, positions)
    for layer in towers["decoder"].layers:
        keys = positions if layer.kind == "cross" else policy.action.horizon
        whole += detr_block(towers["decoder"], layer, policy.action.horizon, keys)
    head = [linear(policy.action.horizon, width, policy.action.dim)]
    return [_part("vision", vision_ops), _part("prefill", whole), _part("head", head)], 0


def _cache(tower: TowerSpec, length: int) -> int:
    return sum(2 * layer.kv_heads * layer.head_dim * length for layer in tower.layers)


FAMILIES = {
    "tiny": _tiny,
    "openvla": _prismatic,
    "openvla-oft": _prismatic,
    "pi0": _flow,
    "pi05": _flow,
    "smolvla": _flow,
    "act": _act,
}
