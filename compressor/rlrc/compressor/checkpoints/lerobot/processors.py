"""The normalisation of inputs and actions and the prompt of lerobot's policies.

Since lerobot 0.4 a folder has two pipelines of processor steps (steps.py). Older folders have none and keep their
statistics among the weights (buffers.py). Missing statistics are an error unless ``ReadOptions.incomplete`` is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlrc.artifact import ActionSpec, CameraSpec, NormStats, PromptSpec, StateSpec
from rlrc.compressor.checkpoints import settings
from rlrc.compressor.checkpoints.layout import Normalisation
from rlrc.compressor.checkpoints.lerobot.buffers import read_buffers, read_modes
from rlrc.compressor.checkpoints.lerobot.features import (
    PolicyFeature,
    dimension_names,
    features,
    meanings,
    number,
    short_name,
)
from rlrc.compressor.checkpoints.lerobot.normaliser import (
    IDENTITY,
    MODES,
    Statistics,
    Values,
    affine,
    check_mode,
    compose,
    identity,
)
from rlrc.compressor.checkpoints.lerobot.steps import (
    ACTION,
    AFTER,
    BEFORE,
    Effect,
    NormalizerStep,
    chain,
    prompt_of,
    read_steps,
)
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions


@dataclass(frozen=True)
class Processors:
    """lerobot's steps for observations before the policy and for actions after it, in their order.

    ``prompt``: the prompt, without the known ids of the vocabulary; None without language. ``state_step``: the index in
    ``before`` of the step that puts the state into the prompt, if any. ``inwards``, ``outwards``: the statistics of
    inputs and of outputs among the weights. ``group``: the data set whose statistics apply, where they are stored by
    data set. ``incomplete``: use the identity for missing statistics instead of raising.
    """

    path: Path
    config: dict[str, Any]
    before: list[Effect]
    after: list[Effect]
    prompt: PromptSpec | None
    state_step: int | None
    inwards: Statistics
    outwards: Statistics
    group: str | None
    incomplete: bool

    def inputs(self, kind: str) -> list[PolicyFeature]:
        """The policy's input features of a kind, in the config's order."""
        return [feature for feature in features(self.config, "input_features") if feature.kind == kind]

    def robot_name(self, feature: PolicyFeature) -> str:
        """The robot's name of a feature: "front" of "observation.images.front"."""
        return short_name(chain(self.before, feature.name)[0])

    def camera(
        self,
        feature: PolicyFeature,
        resize: Literal["none", "pad", "pad-left-top"] = "none",
        size: tuple[int, int] | None = None,
        centre: float = 0.0,
        spread: float = 1.0,
        optional: bool = False,
    ) -> CameraSpec:
        """The camera of a feature. ``size``: height and width after resizing (None: the feature's).

        ``centre``, ``spread``: after the normaliser the policy itself computes (x - centre) / spread.
        """
        if len(feature.shape) != 3 or feature.shape[0] != 3:
            raise UserError(
                f"expected three colours, height and width as the shape of {feature.name} in config.json, found "
                f"{list(feature.shape)}; rlrc supports RGB pictures"
            )
        height, width = size or feature.shape[1:]
        norm = compose(self.norm(feature, 3), NormStats((centre,) * 3, (spread,) * 3))
        return CameraSpec(self.robot_name(feature), height, width, resize, norm.center, norm.scale, "HWC", optional)

    def state(self, feature: PolicyFeature, width: int | None = None, padded: int | None = None) -> StateSpec:
        """The state. config.json has no names or units: joint_0, joint_1, ... and "1". ``padded``: see ``norm``."""
        norm = self.norm(feature, feature.dim, padded)
        dim = len(norm.center)
        return StateSpec(tuple(f"joint_{i}" for i in range(dim)), ("1",) * dim, norm, width)

    def action(self, default: int | None = None, padded: int | None = None) -> ActionSpec:
        """A chunk of ``chunk_size`` continuous actions. ``default``: its dimensions if config.json has none.

        config.json does not state the meaning of actions. Assumes absolute positions in the robot's own units ("1"),
        and a gripper where action_feature_names says so. ``padded``: see ``norm``.
        """
        found = self._outputs()
        if not found and default is not None:
            found = [PolicyFeature(ACTION, "ACTION", (default,))]
        if len(found) != 1:
            raise UserError(
                f"expected one ACTION in output_features of config.json, found {len(found)}; copy the folder again"
            )
        norm = self.norm(found[0], found[0].dim, padded)
        dim = len(norm.center)
        names = dimension_names(self.config.get("action_feature_names"), dim)
        return ActionSpec(number(self.config, "chunk_size"), names, meanings(names), ("1",) * dim, norm, bins=0)

    def norm(self, feature: PolicyFeature, numbers: int, padded: int | None = None) -> NormStats:
        """The map of an input, or of the action as output, of ``numbers`` values (three colours of a picture).

        A feature as wide as ``padded``, the policy's largest width, has the width of its statistics: base policies
        declare their padded width, and lerobot keeps it in policies trained from them. Raises UserError for statistics
        that are missing or do not fit.
        """
        steps = self.normalising_steps(feature)
        if numbers == padded:
            widths = {len(values[one]) for how, values in steps for one in MODES.get(how.mode, ()) if one in values}
            numbers = min(numbers, *widths) if len(widths) == 1 else numbers
        norm = identity(numbers)
        for how, values in steps:
            if how.missing and not self.incomplete:
                choose = "choose one with --unnorm-key" if how.groups else "copy the whole folder again"
                raise UserError(
                    f"expected statistics of {how.feature} in {self.path}, because its mode is {how.mode}, found "
                    f"{how.missing}; {choose}, or use those of your data: rlrc sft {self.path} OUT --data FOLDER"
                )
            if how.mode != IDENTITY and not how.missing:
                what = f"{how.feature} ({how.origin})"
                one = affine(how.mode, values, numbers, how.eps, what, inverse=feature.kind == "ACTION")
                norm = compose(norm, one)
        return norm

    def normalisation(self, inputs: Iterable[PolicyFeature]) -> dict[str, tuple[Normalisation, ...]]:
        """How these inputs and the action are normalised, by names such as "image.top", "state" and "action"."""
        found = {}
        for feature in (*inputs, PolicyFeature(ACTION, "ACTION", ())):
            name = {"STATE": "state", "ENV": "environment_state", "ACTION": ACTION}.get(feature.kind)
            found[name or f"image.{self.robot_name(feature)}"] = tuple(
                how for how, _ in self.normalising_steps(feature)
            )
        return found

    def normalising_steps(self, feature: PolicyFeature) -> list[tuple[Normalisation, Values]]:
        """The normalisations of a feature with their statistics, the one nearest to the raw values first."""
        inwards = [(effect, ACTION) for effect in self.before if isinstance(effect, NormalizerStep)]
        if feature.kind != "ACTION":
            end = self.state_step if feature.kind == "STATE" else None  # later steps do not change the prompt
            _, inwards = chain(self.before[:end], feature.name)
            return [self._by(*pair, feature) for pair in inwards] or [self._by_none(feature, BEFORE)]
        outwards = [(effect, ACTION) for effect in reversed(self.after) if isinstance(effect, NormalizerStep)]
        input_modes, output_modes = ([one.mode(ACTION, "ACTION") for one, _ in pairs] for pairs in (inwards, outwards))
        if outwards and inwards and input_modes != output_modes:
            raise UserError(
                f"expected the same modes of normalisation for {ACTION} in {BEFORE} and {AFTER} of {self.path}, found "
                f"{', '.join(map(str, input_modes))} and {', '.join(map(str, output_modes))}; copy both files from one "
                "folder"
            )
        return [self._by(*pair, feature) for pair in outwards] or [self._by_none(feature, AFTER, input_modes)]

    def _by(self, normaliser: NormalizerStep, name: str, feature: PolicyFeature) -> tuple[Normalisation, Values]:
        mode = normaliser.mode(name, feature.kind)
        if mode is None:
            return Normalisation(name, IDENTITY, f"not in normalize_observation_keys of {normaliser.step}"), {}
        if mode == IDENTITY:
            return Normalisation(name, IDENTITY, normaliser.setting), {}
        if reason := normaliser.explain_unlisted(name):
            return Normalisation(name, mode, missing=reason, eps=normaliser.eps), {}
        others = self.outwards if feature.kind == "ACTION" else self.inwards
        found = [(statistics, statistics.names(name)) for statistics in (normaliser.statistics, others)]
        for group in (self.group, None):  # statistics without a group are for every data set
            for statistics, names in found:
                if (stored := names.get(group or "")) is not None:
                    origin = f"{', '.join(MODES[mode])} of {stored} in {statistics.file}"
                    return Normalisation(name, mode, origin, group, eps=normaliser.eps), statistics.values[stored]
        file, listed = normaliser.statistics.file, tuple(sorted({group for _, names in found for group in names}))
        missing = f"none in {file}" if file else f"no state_file of {normaliser.step}"
        if listed:
            missing = f"only those of the data sets {', '.join(listed)}"
        return Normalisation(name, mode, missing=missing, groups=listed, eps=normaliser.eps), {}

    def _by_none(
        self, feature: PolicyFeature, file: str, input_modes: list[str | None] | None = None
    ) -> tuple[Normalisation, Values]:
        """For a feature that no step normalises: valid only if config.json, or the input's pipeline, says IDENTITY."""
        mapping = self.config.get("normalization_mapping")
        modes = [mode or IDENTITY for mode in input_modes or ()]
        where = BEFORE if modes else "normalization_mapping of config.json"
        if not modes:
            mode = mapping.get(feature.kind) if isinstance(mapping, dict) else None
            mode = mode or (IDENTITY if feature.kind == "ENV" else None)
            if mode is not None:
                check_mode(feature.kind, mode, where)
                modes = [mode]
        step = "an unnormalizer_processor" if file == AFTER else "a normalizer_processor"
        early = " before the state is put into the prompt" * (feature.kind == "STATE" and self.state_step is not None)
        if not modes:
            raise UserError(
                f"expected {step} in {self.path / file}{early}, or a mode for {feature.kind} as normalization_mapping "
                f"of config.json, found neither; add {IDENTITY} there if {feature.name} is not normalised"
            )
        needed = [mode for mode in modes if mode != IDENTITY]
        if not needed:
            return Normalisation(feature.name, IDENTITY, where), {}
        return Normalisation(feature.name, needed[0], missing=f"no {step.split()[1]} in {file}{early}", eps=1e-8), {}

    def _outputs(self) -> list[PolicyFeature]:
        return [feature for feature in features(self.config, "output_features") if feature.kind == "ACTION"]


def read(folder: Folder, language: bool, options: ReadOptions) -> Processors:
    """Reads the folder's processors. ``language``: whether the policy takes an instruction.

    Raises UserError for unknown or unsupported steps and settings, and for a ``ReadOptions.unnorm_key`` without
    statistics.
    """
    inwards, outwards = read_buffers(folder)
    prompt: PromptSpec | None
    if BEFORE not in folder and AFTER not in folder and folder.config.get("type") != "pi05":  # pi0.5 came with 0.4
        kinds = {feature.name: feature.kind for feature in features(folder.config, "input_features")}
        before, after = read_modes(folder.config, kinds, inwards), read_modes(folder.config, kinds, outwards)
        # Before 0.4 an instruction ended with a newline and was not truncated.
        longest = number(folder.config, "tokenizer_max_length", 48)
        prompt, state_step = PromptSpec("{instruction}", longest, None, ("newline",)), None
    else:
        before, after = (read_steps(folder, file) for file in (BEFORE, AFTER))
        prompt, state_step = prompt_of(before)
        if prompt is None and language:
            raise UserError(
                f"expected a tokenizer_processor in {folder.path / BEFORE}, found none; copy the folder again"
            )
    if not language:
        prompt, state_step = None, None
    if state_step is None:
        settings.check_no_prompt_state(folder, options)
    processors = Processors(
        folder.path,
        folder.config,
        before,
        after,
        prompt,
        state_step,
        inwards,
        outwards,
        options.unnorm_key,
        options.incomplete,
    )
    _check_group(processors)
    return processors


def _check_group(processors: Processors) -> None:
    """Raises UserError if the statistics do not have the chosen group."""
    steps = [
        effect.statistics for effect in (*processors.before, *processors.after) if isinstance(effect, NormalizerStep)
    ]
    config, key = processors.config, processors.group
    known = [
        *features(config, "input_features"),
        *features(config, "output_features"),
        PolicyFeature(ACTION, "ACTION", ()),
    ]
    every = (*steps, processors.inwards, processors.outwards)
    groups = sorted({group for one in every for feature in known for group in one.names(feature.name) if group})
    if key is None or key in groups:
        return
    if not groups:
        raise UserError(
            f"expected no --unnorm-key for {processors.path}, whose statistics name no data set, found {key!r}; "
            "leave it out"
        )
    raise UserError(
        f"expected one of the data sets {', '.join(groups)} of {processors.path}, found {key!r}; give another "
        "--unnorm-key"
    )
