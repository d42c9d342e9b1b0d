"""The inputs and outputs that a policy's graphs must have, by its manifest.

Shapes are without the batch dimension. A string is a dimension that must be dynamic; a number may be that number or
dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlrc.artifact import Artifact, GraphSpec, PolicySpec, TensorSpec, TowerSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.decode import logit_rows
from rlrc.runtime.inference.preprocess import prompt_has_state

Shape = tuple[int | str, ...]
Shapes = dict[str, Shape]

NAMES = {
    "parallel": ("vision", "decoder"),
    "autoregressive": ("vision", "decoder"),
    "flow": ("vision", "prefix", "step"),
}
ENDS = ("embed", "head")  # the layers before and after the blocks, where the decoder's file holds only the blocks


def check_interface(artifact: Artifact, graphs: Mapping[str, GraphSpec]) -> None:
    """Raises UserError unless the graphs' declared names and shapes are those that the policy implies."""
    spec, towers = artifact.manifest.policy, artifact.manifest.towers
    names = NAMES[spec.decode]
    if any(graph.file.endswith(".gguf") for graph in graphs.values()):
        names += ENDS
    if set(graphs) != set(names):
        raise UserError(
            f"expected the graphs {' and '.join((', '.join(names[:-1]), names[-1]))} in {artifact.path}, "
            f"found {', '.join(graphs)}; export the artifact again"
        )
    for name, (inputs, outputs) in _expected(spec, towers, graphs).items():
        found = (_shapes(graphs[name].inputs), _shapes(graphs[name].outputs))
        if not (_fit(found[0], inputs) and _fit(found[1], outputs)):
            raise UserError(
                f'expected graph "{name}" of {artifact.path} with {inputs} -> {outputs} after the batch dimension, '
                f"as its policy is described, found {found[0]} -> {found[1]}; export the artifact again"
            )


def _expected(
    spec: PolicySpec, towers: Mapping[str, TowerSpec], graphs: Mapping[str, GraphSpec]
) -> dict[str, tuple[Shapes, Shapes]]:
    """Inputs and outputs of every graph. Family-specific shapes are taken from the graphs themselves."""
    action = spec.action
    image_tokens = _shapes(graphs["vision"].outputs).get("image_tokens", ("tokens", "width"))
    expected = {"vision": ({"pixels": _pixels(spec)}, {"image_tokens": image_tokens})}
    inputs: Shapes = {"image_tokens": (_image_tokens(spec, image_tokens[0]), *image_tokens[1:])}
    if spec.prompt is not None:
        inputs["ids"] = (spec.prompt.max_tokens if spec.prompt.pad_id is not None else "length",)
    state: Shapes = {}
    if spec.state is not None and not prompt_has_state(spec):
        state = {"state": (spec.state.width or len(spec.state.names),)}
    if spec.decode == "parallel":
        chunk: Shape = (action.horizon, action.dim)
        outputs: Shapes = {"logits": (*chunk, logit_rows(action))} if action.bins else {"actions": chunk}
        return expected | _decoder(inputs | state, outputs, graphs)
    if spec.decode == "autoregressive":
        # An engine that caches keys and values internally declares none, and no start if it counts positions.
        past = _cache(towers["decoder"], "past.{layer}.{part}", graphs["decoder"].inputs)
        if "start" in _shapes(graphs["decoder"].inputs):
            inputs["start"] = ()
        present = {name.replace("past", "present"): shape for name, shape in past.items()}
        return expected | _decoder(inputs | state | past, {"logits": (logit_rows(action),)} | present, graphs)
    assert spec.flow is not None
    cache = _cache(towers["decoder"], "{part}.{layer}", graphs["prefix"].outputs)
    step: Shapes = {"x": (action.horizon, spec.flow.width)}
    step |= {"step": ()} if "step" in _shapes(graphs["step"].inputs) else {"t": ()}
    # The state is part of the prefix (SmolVLA) or of every step (pi0).
    first = state if "state" in _shapes(graphs["prefix"].inputs) else {}
    later = state if "state" in _shapes(graphs["step"].inputs) or not first else {}
    velocity: Shapes = {"velocity": (action.horizon, spec.flow.width)}
    return expected | {"prefix": (inputs | first, cache), "step": (step | later | cache, velocity)}


def _decoder(inputs: Shapes, outputs: Shapes, graphs: Mapping[str, GraphSpec]) -> dict[str, tuple[Shapes, Shapes]]:
    """Of the decoder, and of "embed" and "head" where the graphs have them."""
    expected = {"decoder": (inputs, outputs)}
    if "embed" in graphs and "head" in graphs:
        expected |= {"embed": (inputs, _shapes(graphs["embed"].outputs))}
        expected |= {"head": (_shapes(graphs["head"].inputs), outputs)}
    return expected


def _pixels(spec: PolicySpec) -> Shape:
    """The shape of one camera's pixels. Cameras of different sizes need a graph with dynamic sizes."""
    sizes = {(camera.height, camera.width, len(camera.mean), camera.layout) for camera in spec.cameras}
    height, width, channels, layout = next(iter(sizes))
    size: Shape = (height, width) if len(sizes) == 1 else ("height", "width")
    return (*size, channels) if layout == "HWC" else (channels, *size)


def _image_tokens(spec: PolicySpec, of_one: int | str) -> int | str:
    """The number of image tokens of all cameras. Dynamic where cameras may be missing or later passes have none."""
    fixed = spec.decode != "autoregressive" and not any(camera.optional for camera in spec.cameras)
    return of_one * len(spec.cameras) if fixed and isinstance(of_one, int) else "image_tokens"


def _cache(tower: TowerSpec, name: str, declared: tuple[TensorSpec, ...]) -> Shapes:
    """Keys and values of those blocks for which the graph declares them."""
    names = {tensor.name for tensor in declared}
    cache: Shapes = {}
    for i, layer in enumerate(tower.layers):
        for part in ("key", "value"):
            if name.format(layer=i, part=part) in names:
                cache[name.format(layer=i, part=part)] = (layer.kv_heads, "length", layer.head_dim)
    return cache


def _shapes(tensors: tuple[TensorSpec, ...]) -> Shapes:
    return {tensor.name: tensor.shape[1:] for tensor in tensors}


def _fit(declared: Shapes, expected: Shapes) -> bool:
    return declared.keys() == expected.keys() and all(
        len(shape) == len(expected[name])
        and all(isinstance(size, str) or size == wanted for size, wanted in zip(shape, expected[name], strict=True))
        for name, shape in declared.items()
    )
