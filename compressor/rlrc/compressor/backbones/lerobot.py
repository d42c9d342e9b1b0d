"""What the folders of lerobot's policies share: features, processor steps, normalisation, prompts.

Since lerobot 0.4 a folder has policy_preprocessor.json and policy_postprocessor.json, lists of steps whose statistics
are in safetensors of their own (huggingface/lerobot, src/lerobot/processor). Older folders have none of these files and
keep the statistics among the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

from rlrc.artifact import ActionSpec, CameraSpec, NormStats, PromptSpec, StateSpec
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.official import Folder

BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"

Edits = tuple[Literal["lower", "strip", "blanks", "newline"], ...]
Statistics = dict[str, dict[str, tuple[float, ...]]]  # of a feature, by the statistic's name

# The two statistics that a mode of normalisation takes.
MODES = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}

IGNORED = {"to_batch_processor", "device_processor"}  # they move data, and change none of it
NEWLINES = {"smolvla_new_line_processor", "pi0_new_line_processor"}
TELLS_STATE = "pi05_prepare_state_tokenizer_processor_step"
RELATIVE = {"relative_actions_processor", "absolute_actions_processor"}

# Statistics of lerobot before 0.4, such as normalize_inputs.buffer_observation_state.mean.
BUFFER = re.compile(r"(normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_(\w+)\.(\w+)")


@dataclass(frozen=True)
class Feature:
    """One entry of config.json's input_features or output_features."""

    name: str
    kind: str  # VISUAL, STATE, ENV or ACTION
    shape: tuple[int, ...]

    @property
    def dim(self) -> int:
        if len(self.shape) != 1:
            raise UserError(
                f"expected one dimension in the shape of {self.name} in config.json, found {list(self.shape)}; "
                "rlrc takes states and actions that are vectors"
            )
        return self.shape[0]


@dataclass(frozen=True)
class Normaliser:
    """A normalizer_processor or unnormalizer_processor: modes by kind of feature, statistics by feature."""

    modes: Mapping[str, str]
    statistics: Statistics
    eps: float
    only: frozenset[str] | None = None  # features that are normalised (None: all)

    def affine(self, feature: Feature, numbers: int, inverse: bool = False) -> NormStats:
        """Of a feature with so many numbers (three of a picture's colours).

        lerobot adds eps to the deviation on the way in and not on the way out (``inverse``), and puts eps in the place
        of a range of zero; a feature without statistics is left alone. Raises UserError for statistics that do not fit.
        """
        mode = self.modes.get(feature.kind, "IDENTITY")
        skipped = self.only is not None and feature.name not in self.only
        if mode == "IDENTITY" or skipped or feature.name not in self.statistics:
            return NormStats((0.0,) * numbers, (1.0,) * numbers)
        if mode not in MODES:
            raise UserError(
                f"expected one of the normalisation modes IDENTITY, {', '.join(MODES)} for {feature.name}, "
                f"found {mode!r}; upgrade rlrc"
            )
        found = self.statistics[feature.name]
        for name in MODES[mode]:
            values = found.get(name, ())
            if len(values) != numbers or not all(map(isfinite, values)):
                raise UserError(
                    f"expected {numbers} finite numbers as {name} of {feature.name}, which is normalised by {mode}, "
                    f"found {list(values) or 'none'}; copy the folder again or add the data set's statistics"
                )
        first, second = (found[name] for name in MODES[mode])
        if mode == "MEAN_STD":
            # Where nothing varies, eps keeps the way out invertible; it moves an action by less than float32 can tell.
            return NormStats(first, tuple((std or self.eps) if inverse else std + self.eps for std in second))
        ranges = tuple(high - low or self.eps for low, high in zip(first, second, strict=True))
        centers = tuple(low + width / 2 for low, width in zip(first, ranges, strict=True))
        return NormStats(centers, tuple(width / 2 for width in ranges))


@dataclass(frozen=True)
class Processors:
    """What lerobot does to observations before the policy and to actions after it.

    ``renamed``: names of the policy's features -> the robot's. ``prompt``: how an instruction becomes ids, but for the
    vocabulary; None without language.
    """

    config: dict[str, Any]
    before: Normaliser
    after: Normaliser
    renamed: dict[str, str]
    prompt: PromptSpec | None

    def inputs(self, kind: str) -> list[Feature]:
        """The features of a kind that the policy sees, in the config's order."""
        return [feature for feature in features(self.config, "input_features") if feature.kind == kind]

    def called(self, feature: Feature) -> str:
        """The robot's name of a feature: "front" of "observation.images.front"."""
        name = self.renamed.get(feature.name, feature.name)
        return name.removeprefix("observation.").removeprefix("images.")

    def camera(
        self,
        feature: Feature,
        resize: Literal["none", "pad", "pad-left-top"] = "none",
        size: tuple[int, int] | None = None,
        centre: float = 0.0,
        spread: float = 1.0,
        optional: bool = False,
    ) -> CameraSpec:
        """``size``: height and width that the policy resizes to (None: those of the feature).

        ``centre`` and ``spread``: the policy itself computes (x - centre) / spread after the normaliser.
        """
        if len(feature.shape) != 3 or feature.shape[0] != 3:
            raise UserError(
                f"expected three colours, height and width as the shape of {feature.name} in config.json, found "
                f"{list(feature.shape)}; rlrc takes RGB pictures"
            )
        height, width = size or feature.shape[1:]
        norm = self.before.affine(feature, 3)
        mean = tuple(c + s * centre for c, s in zip(norm.center, norm.scale, strict=True))
        std = tuple(s * spread for s in norm.scale)
        return CameraSpec(self.called(feature), height, width, resize, mean, std, "HWC", optional)

    def state(self, feature: Feature, width: int | None = None) -> StateSpec:
        """Names are joint_0, joint_1, ... and the unit is "1": config.json has neither."""
        names = tuple(f"joint_{i}" for i in range(feature.dim))
        return StateSpec(names, ("1",) * feature.dim, self.before.affine(feature, feature.dim), width)

    def action(self, default: int | None = None) -> ActionSpec:
        """A chunk of ``chunk_size`` continuous actions; ``default``: its dimensions where config.json has none.

        Assumed, for config.json does not say: actions are absolute positions in the robot's own units ("1"), but for
        those named as the gripper's (action_feature_names; else they are joint_0, joint_1, ...).
        """
        found = [feature for feature in features(self.config, "output_features") if feature.kind == "ACTION"]
        if not found and default is not None:
            found = [Feature("action", "ACTION", (default,))]
        if len(found) != 1:
            raise UserError(
                f"expected one ACTION in output_features of config.json, found {len(found)}; copy the folder again"
            )
        dim = found[0].dim
        names = self.config.get("action_feature_names") or ()
        if len(names) != dim or len(set(names)) != dim or not all(isinstance(name, str) for name in names):
            names = [f"joint_{i}" for i in range(dim)]
        meaning: list[Literal["absolute", "gripper"]] = ["gripper" if "gripper" in n else "absolute" for n in names]
        norm = self.after.affine(found[0], dim, inverse=True)
        return ActionSpec(number(self.config, "chunk_size"), tuple(names), tuple(meaning), ("1",) * dim, norm, bins=0)


def features(config: dict[str, Any], which: Literal["input_features", "output_features"]) -> list[Feature]:
    """In the order of config.json. Raises UserError for entries that are none."""
    entries = config.get(which)
    try:
        if not isinstance(entries, dict):
            raise TypeError(entries)
        found = [Feature(name, entry["type"], tuple(map(int, entry["shape"]))) for name, entry in entries.items()]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"expected names with type and shape as {which} in config.json, found {entries!r:.80}; copy it again"
        ) from None
    return found


def number(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """A positive whole number of config.json. Raises UserError for anything else."""
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise UserError(f"expected a positive whole number as {name} in config.json, found {value!r}; copy it again")
    return value


def real(values: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of config.json or the hints. Raises UserError for anything else."""
    value = values.get(name, default)
    if type(value) not in (int, float) or not isfinite(value):
        raise UserError(f"expected a number as {name}, found {value!r}; correct config.json or the hints")
    return float(value)


def read(folder: Folder, language: bool) -> Processors:
    """Reads the folder's processors. ``language``: whether the policy takes an instruction.

    Raises UserError for steps that rlrc does not know, or that do what it cannot.
    """
    if BEFORE not in folder and AFTER not in folder:
        return _of_old(folder, language)
    renamed: dict[str, str] = {}
    edits, template, bins, tokens = list[Literal["strip", "blanks", "newline"]](), "{instruction}", 0, None
    before = after = Normaliser({}, {}, 0.0)
    for name, config, state in _steps(folder, BEFORE):
        if name == "rename_observations_processor":
            renamed = {new: old for old, new in dict(config.get("rename_map") or {}).items()}
        elif name == "normalizer_processor":
            before = _normaliser(folder, config, state)
        elif name in NEWLINES:
            edits.append("newline")
        elif name == TELLS_STATE:
            edits += ["strip", "blanks"]
            template, bins = "Task: {instruction}, State: {state};\nAction: ", 256
        elif name == "tokenizer_processor":
            tokens = number(config, "max_length", 512), bool(config.get("truncation", True))
        else:
            _accept(name, config, BEFORE)
    for name, config, state in _steps(folder, AFTER):
        if name == "unnormalizer_processor":
            after = _normaliser(folder, config, state)
        else:
            _accept(name, config, AFTER)
    if language and tokens is None:
        raise UserError(f"expected a tokenizer_processor in {folder.path / BEFORE}, found none; copy the folder again")
    prompt = None
    if language and tokens is not None:
        prompt = PromptSpec(template, tokens[0], None, tuple(edits), state_bins=bins, truncate=tokens[1])
    return Processors(folder.config, before, after, renamed, prompt)


def _steps(folder: Folder, file: str) -> list[tuple[str, dict[str, Any], str | None]]:
    """Name, configuration and file of statistics of every step."""
    values = folder.json(file)
    try:
        return [
            (step.get("registry_name") or step["class"], dict(step.get("config") or {}), step.get("state_file"))
            for step in values["steps"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"expected steps in {folder.path / file}, found: {error!r}; copy that file again") from None


def _accept(name: str, config: dict[str, Any], file: str) -> None:
    """Refuses a step that would change what the policy sees or does."""
    if name in RELATIVE:
        if config.get("enabled"):
            raise UserError(
                f"expected absolute actions, found an enabled {name} in {file}; rlrc does not add the state to actions"
            )
    elif name not in IGNORED:
        raise UserError(f"expected processor steps that rlrc knows in {file}, found {name!r}; upgrade rlrc")


def _normaliser(folder: Folder, config: dict[str, Any], state: str | None) -> Normaliser:
    statistics: Statistics = {}
    if state is not None:
        stored = folder.safetensors(state)
        for name in stored:
            feature, _, statistic = name.rpartition(".")
            statistics.setdefault(feature, {})[statistic] = tuple(stored.read(name).double().flatten().tolist())
    # The way out ignores the list of features, as lerobot does: its only feature is the action.
    listed = {"action", *dict(config.get("features") or {})}
    keys = config.get("normalize_observation_keys")
    only = frozenset(listed if keys is None else {"action", *keys} & listed)
    return Normaliser(dict(config.get("norm_map") or {}), statistics, float(config.get("eps", 1e-8)), only)


def _of_old(folder: Folder, language: bool) -> Processors:
    """Of a folder of lerobot before 0.4: modes from config.json, statistics from the weights.

    Those versions add eps to every range on the way in, which is less than float32 can tell. They end an instruction
    with a newline and do not cut it.
    """
    config = folder.config
    modes = dict(config.get("normalization_mapping") or {})
    inwards, outwards = Statistics(), Statistics()
    for name in folder.tensors:
        if (match := BUFFER.fullmatch(name)) and match[1] != "normalize_targets":
            into = inwards if match[1] == "normalize_inputs" else outwards
            values = tuple(folder.tensors.read(name).double().flatten().tolist())
            into.setdefault(match[2], {})[match[3]] = values
    known = [*features(config, "input_features"), *features(config, "output_features")]
    statistics = Statistics()
    for feature in known:
        found = (outwards if feature.kind == "ACTION" else inwards).get(feature.name.replace(".", "_"))
        if found is not None:
            statistics[feature.name] = found
        elif modes.get(feature.kind, "IDENTITY") != "IDENTITY":
            raise UserError(
                f"expected {BEFORE} in {folder.path}, or among the weights the statistics of {feature.name}, found "
                "neither; copy the folder again"
            )
    normaliser = Normaliser(modes, statistics, 1e-8)
    edits: Edits = ("newline",)
    prompt = PromptSpec("{instruction}", number(config, "tokenizer_max_length", 48), None, edits) if language else None
    return Processors(config, normaliser, normaliser, {}, prompt)
