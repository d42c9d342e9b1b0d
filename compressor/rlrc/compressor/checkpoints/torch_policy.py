"""A torch policy with the runtime's interface and preprocessing: an observation in, one chunk of actions out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlrc.artifact import PolicySpec
from rlrc.compressor.checkpoints import reader, tokenizers
from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.models.device import CPU, of_module
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.runtime.inference import preprocess
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import InferenceTiming, Result
from rlrc.runtime.inference.prompts import Tokenizer


class TorchPolicy:
    """An rlrc.runtime.inference.policy.Policy. ``tokenizer``: for the prompt (None: a policy without language).

    ``load`` returns the module. It runs at the first inference, after the observation has been checked.
    """

    def __init__(self, spec: PolicySpec, tokenizer: Tokenizer | None, load: Callable[[], PolicyModule]) -> None:
        self.spec, self._tokenizer, self._load = spec, tokenizer, load
        self._policy: PolicyModule | None = None
        self.reset()

    @staticmethod
    def from_folder(folder: Folder, options: ReadOptions, where: torch.device = CPU) -> TorchPolicy:
        """The policy of a checkpoint folder, weights as stored. Raises UserError as ``layout`` and ``tokenizer_of``."""
        layout = reader.layout(folder, options)
        reader.print_assumptions(layout)
        spec = layout.spec
        tokenizer = tokenizer_of(folder, options, spec)
        return TorchPolicy(spec, tokenizer, lambda: reader.read(folder, options)[0].to(where))

    def reset(self) -> None:
        """Resets the generator of a flow policy's noise, as rlrc.runtime.inference.policy.LocalPolicy does."""
        self._noise = np.random.default_rng(0)

    def infer(self, observation: Mapping[str, Any]) -> Result:
        """Raises UserError for an observation that does not fit, NoAction for actions that are not finite.

        The timing counts the vision as decoder.
        """
        started = perf_counter()
        inputs = self._inputs(observation)
        prepared = perf_counter()
        policy = self._policy = self._policy or self._load().eval()
        loaded = perf_counter()
        with torch.inference_mode():
            outputs = policy.act(inputs.to(of_module(policy)))
        chunk = outputs.actions[0].cpu()  # waits for an accelerator
        decoded = perf_counter()
        actions = preprocess.unnormalise(chunk.numpy(), self.spec.action.norm)
        if not np.isfinite(actions).all():
            raise NoAction("expected finite actions, found nan or inf; check the weights")
        timing = InferenceTiming(
            preprocess_ms=(prepared - started) * 1e3,
            vision_ms=0.0,
            decoder_ms=(decoded - loaded) * 1e3,
            postprocess_ms=(perf_counter() - decoded) * 1e3,
        )
        tokens = None if outputs.tokens is None else outputs.tokens[0].cpu().numpy()
        return Result(actions=actions, tokens=tokens, timing=timing)

    def _inputs(self, observation: Mapping[str, Any]) -> Inputs:
        """A batch of one."""
        preprocess.check(observation, self.spec)
        prepared = preprocess.prepare(observation, self.spec, self._tokenizer)
        noise = None
        if self.spec.flow is not None:
            noise = observation.get("noise")
            if noise is None:
                noise = self._noise.standard_normal((self.spec.action.horizon, self.spec.flow.width), np.float32)
        return Inputs(
            [_batch(picture) for picture in prepared.pixels],
            ids=None if prepared.ids is None else _batch(prepared.ids),
            state=None if prepared.state is None else _batch(prepared.state),
            noise=None if noise is None else _batch(np.asarray(noise, np.float32)),
        )


def tokenizer_of(folder: Folder, options: ReadOptions, spec: PolicySpec) -> Tokenizer | None:
    """The tokenizer of the policy's prompt. Raises UserError if there is none or its vocabulary differs."""
    if spec.prompt is None:
        return None
    source = tokenizers.of_folder(folder, options)
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / tokenizers.JSON
        tokenizers.write(source, target, spec)
        return Tokenizer(target, spec.prompt)


def _batch(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array[None].copy())
