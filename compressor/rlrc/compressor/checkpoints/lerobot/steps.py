"""Reads LeRobot's processor pipelines (0.4 and later) into the effects of their steps.

policy_preprocessor.json and policy_postprocessor.json list steps with their settings (huggingface/lerobot,
src/lerobot/processor). Every setting is used, has no effect here, or is refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlrc.artifact import PromptSpec
from rlrc.compressor.checkpoints.lerobot.normaliser import (
    IDENTITY,
    KINDS,
    MODES,
    Statistics,
    check_mode,
    read_statistics,
)
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder

BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
ACTION = "action"  # the only name under which LeRobot's normalisers take the action
RELATIVE = "relative_actions_processor"


@dataclass(frozen=True)
class Rename:
    """Renames inputs: new -> old names."""

    olds: Mapping[str, Sequence[str]]

    def old(self, name: str) -> str:
        """The name of the input ``name`` before this step. Raises UserError if there is none or more than one."""
        olds = self.olds.get(name, ())
        gone = not olds and any(name in others for others in self.olds.values())
        if len(olds) > 1 or gone:
            raise UserError(
                f"expected one input that the rename_map of {BEFORE} leaves or renames to {name}, found "
                f"{', '.join(olds) or 'none'}; correct the rename_map"
            )
        return olds[0] if olds else name


@dataclass(frozen=True)
class NormalizerStep:
    """A normalizer_processor or unnormalizer_processor.

    ``modes``: by kind of feature, from the setting ``setting``; ``kinds``: of the listed features; ``only``: the inputs
    that it normalises (None: all listed ones).
    """

    step: str
    setting: str
    modes: Mapping[str, str]
    kinds: Mapping[str, str]
    statistics: Statistics
    eps: float
    only: Collection[str] | None = None

    def mode(self, name: str, kind: str) -> str | None:
        """The mode of a feature; None if ``only`` excludes it. Raises UserError if there is no mode for its kind."""
        if name == ACTION:
            kind = "ACTION"
        elif self.only is not None and name not in self.only:
            return None
        elif name in self.kinds:
            kind = self.kinds[name]
        mode = self.modes.get(kind, IDENTITY if kind == "ENV" else "")  # these families have no setting for ENV
        if not mode:
            raise UserError(
                f"expected a mode for {kind} as {self.setting}, found {', '.join(self.modes) or 'none'}; "
                f"add one, {IDENTITY} if {name} is not normalised"
            )
        return mode

    def explain_unlisted(self, name: str) -> str:
        """Why LeRobot does not normalise an input that has a mode (published bases list no features); else empty."""
        if name == ACTION or name in self.kinds:
            return ""
        return f"no {name} among the features of {self.step} (list it there if training normalised it)"


@dataclass(frozen=True)
class PromptState:
    """pi0.5: puts the state into the prompt. ``padded``: the width to which LeRobot 0.4 pads it."""

    padded: int | None


@dataclass(frozen=True)
class Newline:
    """Ends the text with a newline."""


@dataclass(frozen=True)
class Tokenize:
    max_length: int
    truncation: bool


Effect = Rename | NormalizerStep | PromptState | Newline | Tokenize


class StepSettings:
    """The settings of one step. Each must be taken: ``check_all_taken`` refuses the rest."""

    def __init__(self, name: str, values: Mapping[str, Any], file: str) -> None:
        self.step, self.file = f"{name} in {file}", file
        self._values, self._known = dict(values), list[str]()

    def take(self, name: str, default: Any = None) -> Any:
        self._known.append(name)
        return self._values.pop(name, default)

    def one_of(self, name: str, supported: Sequence[Any], default: Any) -> Any:
        """The value, if it is a supported one of the same type. Raises UserError for any other."""
        value = self.take(name, default)
        if not any(value == one and type(value) is type(one) for one in supported):
            raise self.refusal(name, value, " or ".join(map(json.dumps, supported)))
        return value

    def number(self, name: str, default: int | None) -> int | None:
        value = self.take(name, default)
        if value is not None and (type(value) is not int or value < 1):
            raise self.refusal(name, value, "a positive whole number")
        return value

    def refusal(self, name: str, value: Any, supported: str) -> UserError:
        return UserError(
            f"expected {supported} as {name} of {self.step}, found {value!r:.80}; rlrc does not support it"
        )

    def check_all_taken(self) -> None:
        """Raises UserError for a setting that was not taken."""
        for name, value in self._values.items():
            listed = ", ".join(self._known) or "none"
            raise UserError(
                f"expected settings of {self.step} that rlrc knows ({listed}), found {name} {value!r:.80}; rlrc does "
                "not know its effect"
            )


def read_steps(folder: Folder, file: str) -> list[Effect]:
    """The effects of a pipeline's steps in their order, without steps that have no effect here.

    Raises UserError for unknown or unsupported steps and settings.
    """
    found: list[Effect] = []
    for name, values, state in _steps(folder, file):
        settings = StepSettings(name, values, file)
        effect = _effect(folder, name, settings, state, file == BEFORE)
        settings.check_all_taken()
        found += [] if effect is None else [effect]
    return found


def _steps(folder: Folder, file: str) -> list[tuple[str, dict[str, Any], str | None]]:
    """Name, settings and file of statistics of every step."""
    values = folder.json(file)
    try:
        steps = [
            (step.get("registry_name") or step["class"], dict(step.get("config") or {}), step.get("state_file"))
            for step in values["steps"]
        ]
        if not all(isinstance(name, str) and isinstance(state, (str, type(None))) for name, _, state in steps):
            raise TypeError("a name that is no string")
        if outside := [state for _, _, state in steps if state is not None and Path(state).name != state]:
            raise ValueError(f"a state_file outside of the folder: {outside[0]}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"expected steps in {folder.path / file}, found: {error!r}; copy that file again") from None
    return steps


def _effect(folder: Folder, name: str, settings: StepSettings, state: str | None, before: bool) -> Effect | None:
    if name == "device_processor":
        settings.take("device")
        settings.one_of("float_dtype", (None, "float32", "float"), None)
    elif name == "to_batch_processor":
        pass
    elif name == (RELATIVE if before else "absolute_actions_processor"):
        if settings.take("enabled", False):
            raise UserError(
                f"expected absolute actions, found an enabled {settings.step}; rlrc does not add the state to actions"
            )
        settings.take("exclude_joints")  # without effect unless enabled
        settings.take("action_names")
    elif name == ("normalizer_processor" if before else "unnormalizer_processor"):
        return _normaliser(folder, settings, state)
    elif before and name == "rename_observations_processor":
        return _rename(settings)
    elif before and name in ("smolvla_new_line_processor", "pi0_new_line_processor"):
        return Newline()
    elif before and name == "pi05_prepare_state_tokenizer_processor_step":
        settings.one_of("task_key", ("task",), "task")
        return PromptState(settings.number("max_state_dim", None))
    elif before and name == "tokenizer_processor":
        settings.take("tokenizer_name")  # the vocabulary is checked against the prompt's known pieces
        settings.one_of("task_key", ("task",), "task")
        settings.one_of("padding_side", ("right",), "right")
        # Padding has no effect: the policy masks it.
        settings.one_of("padding", ("max_length", "longest", "do_not_pad", True, False), "max_length")
        longest = settings.number("max_length", 512)
        if longest is None:
            raise settings.refusal("max_length", None, "a positive whole number")
        return Tokenize(longest, settings.one_of("truncation", (True, False), True))
    else:
        advice = "rlrc runs no code of a checkpoint" if "." in name else "upgrade rlrc"
        raise UserError(f"expected processor steps that rlrc knows in {settings.file}, found {name!r}; {advice}")
    return None


def _rename(settings: StepSettings) -> Rename:
    names = settings.take("rename_map") or {}
    if not isinstance(names, dict) or not all(isinstance(new, str) for new in names.values()):
        raise settings.refusal("rename_map", names, "names of inputs with their new names")
    olds: dict[str, list[str]] = {}
    for old, new in names.items():
        olds.setdefault(new, []).append(old)
    return Rename({new: tuple(old) for new, old in olds.items()})


def _normaliser(folder: Folder, settings: StepSettings, state: str | None) -> NormalizerStep:
    settings.take("device")
    settings.one_of("dtype", (None, "float32", "torch.float32"), None)
    modes, eps = settings.take("norm_map"), settings.take("eps", 1e-8)
    if not isinstance(modes, dict) or not modes:
        raise UserError(
            f"expected a mode of normalisation by kind of feature as norm_map of {settings.step}, found {modes!r:.80}; "
            f"copy that file again, or add them ({', '.join((IDENTITY, *MODES))})"
        )
    for kind, mode in modes.items():
        check_mode(kind, mode, f"norm_map of {settings.step}")
    if type(eps) not in (int, float) or not isfinite(eps) or eps < 0:
        raise settings.refusal("eps", eps, "a finite number of at least 0")
    listed, only = settings.take("features"), settings.take("normalize_observation_keys")
    try:
        kinds = {name: str(feature["type"]) for name, feature in dict(listed or {}).items()}
    except (KeyError, TypeError, ValueError):
        raise settings.refusal("features", listed, "names with type and shape") from None
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise settings.refusal(f"the type of {name}", kind, " or ".join(KINDS))
    if only is not None and not (isinstance(only, list) and all(isinstance(name, str) for name in only)):
        raise settings.refusal("normalize_observation_keys", only, "names of inputs")
    given = settings.take("stats")  # they take precedence over the file's
    statistics = _parse_stats(settings, given) if given else read_statistics(folder, state)
    return NormalizerStep(settings.step, f"norm_map of {settings.step}", modes, kinds, statistics, float(eps), only)


def _parse_stats(settings: StepSettings, given: Any) -> Statistics:
    try:
        values = {
            str(name): {str(one): torch.tensor(numbers, dtype=torch.float64) for one, numbers in dict(stats).items()}
            for name, stats in dict(given).items()
        }
    except (TypeError, ValueError, RuntimeError):
        raise settings.refusal("stats", given, "numbers by feature and statistic") from None
    return Statistics(f"stats of {settings.step}", values)


def step_names(folder: Folder, file: str) -> list[str]:
    return [name for name, _, _ in _steps(folder, file)]


def prompt_of(effects: Sequence[Effect]) -> tuple[PromptSpec | None, int | None]:
    """The prompt (None without a tokenizer), and the index of the step that puts the state into it.

    Steps after the last tokenizer have no effect on the prompt.
    """
    edits, state_step = list[Literal["strip", "blanks", "newline"]](), None
    found: tuple[PromptSpec | None, int | None] = None, None
    text = PromptSpec("{instruction}", 1, None)
    for index, effect in enumerate(effects):
        if isinstance(effect, Newline) and state_step is None:
            edits.append("newline")
        elif isinstance(effect, Newline) and not text.template.endswith("\n"):
            text = replace(text, template=text.template + "\n")
        elif isinstance(effect, PromptState):
            if state_step is not None:
                raise UserError(
                    f"expected one step that puts the state into the prompt in {BEFORE}, found two; rlrc does not "
                    "support it"
                )
            state_step, edits = index, [*edits, "strip", "blanks"]
            text = replace(text, template="Task: {instruction}, State: {state};\nAction: ", state_bins=256)
        elif isinstance(effect, Tokenize):
            prompt = replace(text, max_tokens=effect.max_length, edits=tuple(edits), truncate=effect.truncation)
            found = prompt, state_step
    return found


def chain(effects: Sequence[Effect], name: str) -> tuple[str, list[tuple[NormalizerStep, str]]]:
    """The robot's name of an input, and its normalisers in their order, each with the input's name at that point."""
    found: list[tuple[NormalizerStep, str]] = []
    for effect in reversed(effects):
        if isinstance(effect, Rename):
            name = effect.old(name)
        elif isinstance(effect, NormalizerStep):
            found.insert(0, (effect, name))
    return name, found
