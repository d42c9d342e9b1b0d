"""Meta-World's observations as inputs of a policy, for any family that fits the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlrc.artifact import PolicySpec
from rlrc.compressor.models.policy import Inputs
from rlrc.compressor.training.batches import collate
from rlrc.envs.metaworld import ACTION_NAMES, STATE_NAMES, TASKS
from rlrc.errors import UserError
from rlrc.runtime.inference.pictures import to_pixels
from rlrc.runtime.inference.preprocess import ModelInputs, normalise, prompt_has_state, select_state
from rlrc.runtime.inference.prompts import Tokenizer


def check_fits_simulator(spec: PolicySpec) -> None:
    """Raises UserError unless Meta-World's camera, state, actions and instructions fit the policy."""
    names = [camera.name for camera in spec.cameras]
    if len(names) != 1:
        raise UserError(
            f"expected a policy with one camera, as Meta-World has, found {len(names)} ({', '.join(names)}); rlrc has "
            "no simulator for it"
        )
    (camera,) = spec.cameras
    if camera.resize == "none" and camera.height != camera.width:
        raise UserError(
            f"expected square pictures, which Meta-World gives, or a camera that resizes, found {camera.height} x "
            f"{camera.width}; rlrc has no simulator for it"
        )
    state = None if spec.state is None else len(spec.state.names)
    for name, expected, found in (
        ("state", len(STATE_NAMES), state),
        ("action", len(ACTION_NAMES), spec.action.dim),
    ):
        if found is not None and found != expected:
            raise UserError(
                f"expected {expected} numbers of {name}, as Meta-World has, found {found}; rlrc has no simulator for it"
            )
    without = [name for name, task in TASKS.items() if not task.instruction.strip()]
    if spec.prompt is not None and without:
        raise UserError(
            f"expected an instruction of every task for a policy with a prompt, found none of {without[0]}; "
            "take another environment"
        )


class Observer:
    """Pictures, raw states and task names -> the policy's inputs."""

    def __init__(self, spec: PolicySpec, tokenizer: Tokenizer | None) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self._prompts = dict[str, np.ndarray]()

    def __call__(self, tasks: Sequence[str], images: np.ndarray, state: np.ndarray) -> Inputs:
        """Pictures (B, H, W, 3), raw state (B, S)."""
        prompt = self.prompt(tasks, state)
        pixels = torch.from_numpy(to_pixels(images, self.spec.cameras[0]))
        return replace(prompt, pixels=[pixels], state=self.state(state))

    def state(self, state: np.ndarray) -> Tensor | None:
        """Raw states (B, S) -> normalised states, or None if the policy does not take one as a tensor."""
        if self.spec.state is None:
            return None
        given = select_state(normalise(state, self.spec.state.norm), self.spec)
        return None if given is None else torch.from_numpy(given)

    def prompt(self, tasks: Sequence[str], state: np.ndarray) -> Inputs:
        """Inputs with ``ids`` and ``mask`` (B, L) and ``lengths`` alone: the tasks' prompts, for raw states (B, S)."""
        if self.tokenizer is None:
            return Inputs([])
        return collate(
            [ModelInputs([], self._tokenize(task, row), None) for task, row in zip(tasks, state, strict=True)]
        )

    def _tokenize(self, task: str, state: np.ndarray) -> np.ndarray:
        assert self.tokenizer is not None
        if prompt_has_state(self.spec):
            assert self.spec.state is not None
            return self.tokenizer(TASKS[task].instruction, normalise(state, self.spec.state.norm))
        if task not in self._prompts:
            self._prompts[task] = self.tokenizer(TASKS[task].instruction)
        return self._prompts[task]
