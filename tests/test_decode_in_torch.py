"""The numpy drivers and the torch ones, over the same torch policies from the official folders, and their actions.

The numpy side is the runtime's as a whole: its preprocessing too. Only the graphs are torch modules here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.runtime.inference import decode
from rlrc.runtime.inference.preprocess import Tokenizer, check, prepare, unnormalise

DATA = Path(__file__).parent / "data"
TOKENIZERS = {"pi0": "pi0/tokenizer", "pi05": "pi05/tokenizer", "smolvla": "smolvla/tiny_smolvlm", "act": None}


class Graphs:
    """Runs a policy's parts as the graphs of its driver."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.past: Any = None

    def __call__(self, graph: str, tensors: decode.Tensors) -> decode.Tensors:
        given = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        outputs = getattr(self, graph)(given)
        return {name: tensor.detach().numpy() for name, tensor in outputs.items()}

    def decoder(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.policy.spec.decode == "parallel":
            decoded = self.policy.decode(given["image_tokens"], given.get("ids"), None, given.get("state"))
            return {"logits" if self.policy.spec.action.bins else "actions": decoded}
        image_tokens = given["image_tokens"] if given["image_tokens"].shape[1] else None
        past = self.past if given["start"] else None
        logits, self.past = self.policy.step(image_tokens, given["ids"], past)
        return {"logits": logits}

    def prefix(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        past, _ = self.policy.prefix(given["image_tokens"], given["ids"], None, given.get("state"))
        keys = {f"key.{i}": key for i, (key, _) in enumerate(past)}
        return keys | {f"value.{i}": value for i, (_, value) in enumerate(past)}

    def step(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        past = [(given[f"key.{i}"], given[f"value.{i}"]) for i in range(len(self.policy.towers["decoder"].layers))]
        return {"velocity": self.policy.velocity(past, None, given.get("state"), given["x"], given["t"])}


def decoded(
    policy: PolicyModule, observation: dict[str, Any], tokenizer: Tokenizer | None
) -> tuple[decode.Decoded, Inputs]:
    """By the numpy driver; and the same inputs for the torch one."""
    spec, run = policy.spec, Graphs(policy)
    check(observation, spec)
    prepared = prepare(observation, spec, tokenizer)
    pixels = [torch.from_numpy(picture[None]) for picture in prepared.pixels]
    inputs = {"image_tokens": torch.cat([policy.encode_image(picture) for picture in pixels], 1).numpy()}
    for name in ("ids", "state"):
        if (value := getattr(prepared, name)) is not None:
            inputs[name] = value[None]
    noise = observation["noise"][None] if spec.flow else None
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items() if name != "image_tokens"}
    given_noise = None if noise is None else torch.from_numpy(noise)
    same = Inputs(pixels, tensors.get("ids"), tensors.get("state"), noise=given_noise)
    if spec.flow:
        return decode.flow(run, inputs, spec.action, spec.flow, noise), same
    if spec.decode == "parallel":
        return decode.parallel(run, inputs, spec.action), same
    return decode.autoregressive(run, inputs, spec.action), same


def observations(family: str, policy: PolicyModule) -> list[dict[str, Any]]:
    golden, told = np.load(DATA / family / "golden.npz"), json.loads((DATA / family / "golden.json").read_text())
    found = []
    for i in range(2):
        observation: dict[str, Any] = {}
        for camera in policy.spec.cameras:
            names = [name for name in (f"obs{i}.image.{camera.name}", f"obs{i}.{camera.name}") if name in golden.files]
            observation[f"image.{camera.name}"] = golden[names[0]]
        if policy.spec.state is not None:
            observation["state"] = golden[f"obs{i}.state"]
        if policy.spec.prompt is not None:
            observation["instruction"] = told["observations"][i]["instruction"]
        if policy.spec.flow is not None:
            observation["noise"] = golden["noise"][i]
        found.append(observation)
    return found


@pytest.mark.parametrize(
    "family", ["openvla", "openvla-oft-l1", "openvla-oft-discrete", "pi0", "pi05", "smolvla", "act"]
)
def test_drivers_agree_with_each_other_and_the_official_code(family: str) -> None:
    golden, told = np.load(DATA / family / "golden.npz"), json.loads((DATA / family / "golden.json").read_text())
    unnorm_key = (told.get("observations") or [{}])[0].get("unnorm_key")
    options = ReadOptions(read_hints(DATA / family / "golden.json"), unnorm_key=unnorm_key)
    policy = read(open_folder(DATA / family / "checkpoint"), options)[0].float().eval()
    folder = TOKENIZERS.get(family, "openvla/checkpoint")
    tokenizer = None
    if policy.spec.prompt is not None:
        tokenizer = Tokenizer(DATA / str(folder) / "tokenizer.json", policy.spec.prompt)
    for i, observation in enumerate(observations(family, policy)):
        with torch.inference_mode():
            ours, inputs = decoded(policy, observation, tokenizer)
            theirs = policy.act(inputs)
        actions = unnormalise(theirs.actions.numpy(), policy.spec.action.norm)
        np.testing.assert_allclose(ours.actions, actions, atol=2e-6)
        official = golden[f"obs{i}.actions"] if f"obs{i}.actions" in golden.files else golden["actions"][i]
        np.testing.assert_allclose(ours.actions[0], official.reshape(ours.actions[0].shape), atol=1e-5)
        if policy.spec.action.bins:
            assert ours.tokens is not None
            assert theirs.tokens is not None
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.tokens.ravel().tolist() == golden[f"obs{i}.tokens"].tolist()
