"""Decides whether pi0.5's prompt pads the state: LeRobot 0.4 pads it, 0.5 and later do not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlrc.artifact import PolicySpec
from rlrc.compressor.checkpoints.lerobot.features import number
from rlrc.compressor.checkpoints.lerobot.processors import Processors
from rlrc.compressor.checkpoints.lerobot.steps import BEFORE, RELATIVE, PromptState, step_names
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder

TRAINED = "train_config.json"  # the settings of the training run


def set_prompt_state(
    folder: Folder, processors: Processors, spec: PolicySpec, given: str | None
) -> tuple[PolicySpec, tuple[str, ...]]:
    """The spec with the training's rule for the state in the prompt, and the assumptions. ``given``: --prompt-state.

    Raises UserError if padding makes a difference and neither the folder nor ``given`` determines the rule.
    """
    if processors.state_step is None or spec.state is None:
        return spec, ()
    effect, numbers = processors.before[processors.state_step], len(spec.state.names)
    assert isinstance(effect, PromptState)
    most = effect.padded or number(folder.config, "max_state_dim", 32)
    if most <= numbers and given is None:  # both rules agree
        return spec, ()
    rule, assumed = (given, "") if given else _training_rule(folder)
    if rule is None:
        raise UserError(
            f"expected the version of LeRobot that trained {folder.path}, found neither {TRAINED} nor {RELATIVE}; "
            f"give --prompt-state padded (0.4: the prompt has {most} numbers of the state, zeros at the end) or "
            f"--prompt-state unpadded (0.5 and later: its {numbers})"
        )
    if rule == "padded":
        assert spec.prompt is not None
        spec = replace(spec, prompt=replace(spec.prompt, state_width=most))
    return spec, (assumed,) if assumed else ()


def _training_rule(folder: Folder) -> tuple[str | None, str]:
    """The rule of the LeRobot version that trained the policy, and the assumption if train_config.json decides."""
    if RELATIVE in step_names(folder, BEFORE) or "use_relative_actions" in folder.config:  # since 0.5.1
        return "unpadded", ""
    trained = folder.json(TRAINED) if TRAINED in folder else None
    if not isinstance(trained, dict) or not {"policy", "dataset"} <= trained.keys():
        return None, ""
    later = "cudnn_deterministic" in trained  # since 0.5.0
    rule, version = ("unpadded", "0.5 or later") if later else ("padded", "0.4")
    return rule, f"the state is {rule} in the prompt: {TRAINED} is of LeRobot {version} (--prompt-state)"
