"""How far changed weights move the actions: the mean absolute difference from the float policy, in normalised units.

For token policies the expected action is compared: bin centres weighted by the softmax of the logits of the bins alone.
The likeliest bin would stay the same under most small changes and hide their cost. An autoregressive policy continues
from the tokens it chose: if a change flips a token, the error includes all that follows, as on the robot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from rlrc.compressor.models.device import upload
from rlrc.compressor.models.nn.linear import Stored
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule
from rlrc.compressor.models.storage.tensors import rows_of
from rlrc.compressor.quantize.calibration import check_calibration
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import bin_centers


class ActionError:
    """Compares with the policy's actions at construction, on these observations.

    Raises UserError if there are no observations, or if they or the actions are not finite.
    """

    def __init__(self, policy: PolicyModule, calibration: Iterable[Inputs]) -> None:
        self.policy, self.inputs = policy, fix_noise(policy, check_calibration(calibration))
        if not self.inputs:
            raise UserError("expected calibration observations, found none; give at least one")
        self.expected = self._actions()
        if not self.expected.isfinite().all():
            raise UserError("expected finite actions of the float policy, found NaN or infinity; repair the checkpoint")

    def measure(self, changes: Mapping[str, Tensor]) -> float:
        """The action error with these tensors in place of the policy's own; infinite if an action is not finite."""
        with swap_tensors(self.policy, changes):
            error = (self._actions() - self.expected).abs().mean()
        return float(error.nan_to_num(float("inf")))

    def _actions(self) -> Tensor:
        """(N, horizon, dim)."""
        with torch.inference_mode():
            return torch.cat([soft_actions(self.policy, self.policy.act(inputs)) for inputs in self.inputs])


def soft_actions(policy: PolicyModule, outputs: Outputs) -> Tensor:
    """Normalised actions (B, horizon, dim); for token policies the expected ones."""
    action, logits = policy.spec.action, outputs.logits
    if logits is None:
        return outputs.actions
    if action.tokens is not None:  # the row of every bin
        bins = torch.arange(action.bins, device=logits.device)
        logits = logits[..., action.tokens.first - action.tokens.offset - bins]
    centers = upload(torch.from_numpy(bin_centers(action.bins)), logits.device).to(logits)
    return logits.softmax(-1) @ centers


def fix_noise(policy: PolicyModule, calibration: list[Inputs]) -> list[Inputs]:
    """Add noise to the observations of a flow policy, so that it always starts from the same."""
    if policy.spec.flow is None:
        return calibration
    generator, shape = torch.Generator().manual_seed(0), (policy.spec.action.horizon, policy.spec.flow.width)

    def noise(inputs: Inputs) -> Tensor:
        pixels = inputs.pixels[0]
        return torch.randn(len(pixels), *shape, generator=generator).to(pixels.device)

    return [inputs if inputs.noise is not None else replace(inputs, noise=noise(inputs)) for inputs in calibration]


@contextmanager
def swap_tensors(policy: PolicyModule, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, the policy has these tensors in place of its own. Layers read theirs when they compute."""
    own = dict(policy.named_parameters()) | dict(policy.named_buffers())
    layers, values = dict[str, Stored](), dict[str, Tensor]()
    for name in tensors:
        layer = policy.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Stored) and name.endswith(".weight"):
            layers[name] = layer
        else:
            values[name] = own[name].data
    before = {name: layer.source for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.source = rows_of(tensors, name)
        for name, tensor in values.items():
            own[name].data = tensors[name].to(tensor)
        yield
    finally:
        for name, layer in layers.items():
            layer.source = before[name]
        for name, tensor in values.items():
            own[name].data = tensor
