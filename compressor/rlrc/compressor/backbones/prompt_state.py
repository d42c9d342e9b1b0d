"""Whether the state is padded before pi0.5's prompt tells it: LeRobot did that until 0.4, and does not since 0.5."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlrc.artifact import PolicySpec
from rlrc.compressor.backbones.lerobot import Processors, number
from rlrc.compressor.backbones.processor_steps import BEFORE, RELATIVE, TellState, step_names
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.official import Folder

TRAINED = "train_config.json"  # how LeRobot was started


def with_prompt_state(
    folder: Folder, processors: Processors, spec: PolicySpec, given: str | None
) -> tuple[PolicySpec, tuple[str, ...]]:
    """The spec whose prompt tells the state as in training, and what tells so. ``given``: the rule.

    Raises UserError where that makes a difference and neither the folder nor the user says which it was.
    """
    if processors.told is None or spec.state is None:
        if given is not None:
            raise UserError(f"expected --prompt-state with pi0.5 only, found {given!r} for {spec.family}; leave it out")
        return spec, ()
    effect, numbers = processors.before[processors.told], len(spec.state.names)
    assert isinstance(effect, TellState)
    most = effect.padded or number(folder.config, "max_state_dim", 32)
    if most <= numbers and given is None:  # the same by both rules
        return spec, ()
    rule, assumed = (given, "") if given else _trained_with(folder)
    if rule is None:
        raise UserError(
            f"expected what tells which LeRobot trained {folder.path}, found neither {TRAINED} nor {RELATIVE}; "
            f"give --prompt-state padded (0.4: the prompt tells {most} numbers of the state, zeros behind) or "
            f"--prompt-state unpadded (0.5 and later: its {numbers})"
        )
    if rule == "padded":
        assert spec.prompt is not None
        spec = replace(spec, prompt=replace(spec.prompt, state_width=most))
    return spec, (assumed,) if assumed else ()


def _trained_with(folder: Folder) -> tuple[str | None, str]:
    """The rule of the LeRobot that trained a pi0.5, and what was concluded from a file beside the policy."""
    if RELATIVE in step_names(folder, BEFORE) or "use_relative_actions" in folder.config:  # since 0.5.1
        return "unpadded", ""
    trained = folder.json(TRAINED) if TRAINED in folder else None
    if not isinstance(trained, dict) or not {"policy", "dataset"} <= trained.keys():
        return None, ""
    later = "cudnn_deterministic" in trained  # since 0.5.0
    rule, version = ("unpadded", "0.5 or later") if later else ("padded", "0.4")
    return rule, f"the prompt tells the state {rule}: {TRAINED} is of LeRobot {version} (--prompt-state)"
