"""OpenVLA and OpenVLA-OFT against what the official code recorded: every stage of it.

The references were computed in float32 on a CPU; everything is held to 1e-5, tokens to equality.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlrc.artifact import NormStats, from_json, to_json
from rlrc.compressor.checkpoints import geometry, reader
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.models import decode, families
from rlrc.compressor.models.oft import OFTPolicy
from rlrc.compressor.models.openvla import OpenVLAPolicy
from rlrc.compressor.models.policy import Inputs
from rlrc.runtime.inference import pictures, preprocess
from rlrc.runtime.inference.decode import tokens_to_actions

DATA = Path(__file__).parent / "data"
TOKENIZER = DATA / "openvla" / "checkpoint" / "tokenizer.json"
GOLDENS = ("openvla", "openvla-oft-l1", "openvla-oft-discrete")


class Golden:
    """A recorded checkpoint, opened."""

    def __init__(self, name: str) -> None:
        self.path = DATA / name / "checkpoint"
        self.options = ReadOptions(read_hints(DATA / name / "golden.json"))
        self.policy, self.layout = read(open_folder(self.path), self.options)
        self.spec = self.layout.spec
        with np.load(DATA / name / "golden.npz") as arrays:
            self.arrays = dict(arrays)
        self.observations = json.loads((DATA / name / "golden.json").read_text())["observations"]

    def inputs(self, n: int) -> Inputs:
        """The raw observation, preprocessed as the runtime does."""
        assert self.spec.prompt is not None
        tokenizer = preprocess.Tokenizer(TOKENIZER, self.spec.prompt)
        ids = torch.from_numpy(tokenizer(self.observations[n]["instruction"]))[None]
        cameras = self.spec.cameras
        shots = [pictures.to_pixels(self.arrays[f"obs{n}.{camera.name}"], camera) for camera in cameras]
        pixels = [torch.from_numpy(shot)[None] for shot in shots]
        if self.spec.state is None:
            return Inputs(pixels, ids)
        state = preprocess.normalise(self.arrays[f"obs{n}.state"], self.spec.state.norm)
        return Inputs(pixels, ids, torch.from_numpy(state)[None])

    def raw(self, actions: torch.Tensor) -> np.ndarray:
        return preprocess.unnormalise(actions.numpy(), self.spec.action.norm)


@pytest.fixture(scope="module")
def goldens() -> dict[str, Golden]:
    return {name: Golden(name) for name in GOLDENS}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def close(found: Any, expected: np.ndarray) -> None:
    """To 1e-5, of values up to 1; of larger ones to 1e-5 of the largest.

    On the kind of CPU where they were recorded nearly all differences are zero, elsewhere they are rounding. The
    logits, up to 28, are themselves 1.1e-4 from what the same weights give in float64.
    """
    found = torch.as_tensor(found).reshape(expected.shape).double()
    scale = max(1.0, float(np.abs(expected).max()))
    torch.testing.assert_close(found, torch.from_numpy(expected).double(), atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("name", GOLDENS)
def test_what_the_policy_sees(goldens: dict[str, Golden], name: str, n: int) -> None:
    golden, inputs = goldens[name], goldens[name].inputs(n)
    policy, arrays = golden.policy, golden.arrays
    assert isinstance(policy, (OpenVLAPolicy, OFTPolicy))
    assert inputs.ids is not None
    assert inputs.ids[0].tolist() == [*arrays[f"obs{n}.input_ids"][0].tolist(), 29871]
    close(torch.cat([pixels.movedim(-1, 1) for pixels in inputs.pixels], 1), arrays[f"obs{n}.pixel_values"])
    close(torch.cat([policy.features(pixels) for pixels in inputs.pixels], 1), arrays[f"obs{n}.vision_features"])
    close(decode.encode_images(policy, inputs), arrays[f"obs{n}.projected"])
    assert (inputs.state is None) == (f"obs{n}.state" not in arrays)
    if inputs.state is not None:
        close(inputs.state, arrays[f"obs{n}.proprio_normalized"])


@pytest.mark.parametrize("n", [0, 1])
def test_openvla_golden(goldens: dict[str, Golden], n: int) -> None:
    golden, inputs = goldens["openvla"], goldens["openvla"].inputs(n)
    policy, arrays, ids = golden.policy, golden.arrays, inputs.ids
    assert isinstance(policy, OpenVLAPolicy)
    assert ids is not None
    words, length = policy.embedding(ids), arrays[f"obs{n}.prefix_hidden"].shape[1]
    prefix = torch.cat([words[:, :1], decode.encode_images(policy, inputs), words[:, 1:]], 1)
    close(policy.decoder(prefix, torch.full((length, length), -torch.inf).triu(1))[0], arrays[f"obs{n}.prefix_hidden"])
    outputs = policy.act(inputs)
    assert outputs.logits is not None
    assert outputs.tokens is not None
    assert outputs.logits.shape == (1, 1, 7, 32064)
    close(outputs.logits[..., 31744:32000], arrays[f"obs{n}.action_logits"])
    assert outputs.tokens.flatten().tolist() == arrays[f"obs{n}.tokens"].tolist()
    close(golden.raw(outputs.actions), arrays[f"obs{n}.actions"])


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("name", GOLDENS[1:])
def test_oft_golden(goldens: dict[str, Golden], name: str, n: int) -> None:
    golden, inputs = goldens[name], goldens[name].inputs(n)
    policy, arrays, ids = golden.policy, golden.arrays, inputs.ids
    assert isinstance(policy, OFTPolicy)
    assert ids is not None
    seen = decode.encode_images(policy, inputs)
    sequence = policy.sequence(seen, ids, inputs.state)
    close(sequence, arrays[f"obs{n}.merged_embeds"])
    close(policy.decoder(sequence)[0], arrays[f"obs{n}.hidden"])
    close(policy.hidden(seen, ids, None, inputs.state), arrays[f"obs{n}.action_hidden"])
    outputs = policy.act(inputs)
    if outputs.tokens is None:
        close(outputs.actions, arrays[f"obs{n}.actions_normalized"])
    else:
        assert outputs.logits is not None
        close(outputs.logits.flatten(1, 2)[..., 31744:32000], arrays[f"obs{n}.action_logits"])
        assert outputs.tokens.flatten().tolist() == arrays[f"obs{n}.tokens"].tolist()
    close(golden.raw(outputs.actions), arrays[f"obs{n}.actions"])


@pytest.mark.parametrize("name", ["openvla", "openvla-oft-discrete"])
def test_every_token_is_a_bin(goldens: dict[str, Golden], name: str) -> None:
    """Beyond the ends counts as the end. The centres are kept in float32, which is off by up to 3e-8."""
    action, arrays = goldens[name].spec.action, goldens[name].arrays
    ids, expected = arrays["decode_ids"], arrays["decode_normalized"]
    assert action.tokens is not None
    ones = replace(action, norm=NormStats((0.0,), (1.0,)), names=("x",))
    np.testing.assert_allclose(tokens_to_actions(ids[:, None], ones)[:, 0], expected, atol=4e-8, rtol=0)
    logits = F.one_hot(torch.from_numpy(ids.clip(0, action.tokens.rows - 1)), action.tokens.rows)
    outputs = decode.outputs_from_logits(logits[:, None, None], action)
    np.testing.assert_allclose(outputs.actions[:, 0, 0].numpy(), expected, atol=4e-8, rtol=0)


@pytest.mark.parametrize("name", ["openvla", "openvla-oft-discrete"])
def test_a_head_of_the_action_tokens_alone_gives_the_same_tokens(goldens: dict[str, Golden], name: str) -> None:
    golden = goldens[name]
    action, state = golden.spec.action, dict(golden.policy.state_dict())
    assert action.tokens is not None
    tokens = replace(action.tokens, rows=256, offset=31744)
    cut = families.build(replace(golden.spec, action=replace(action, tokens=tokens)), golden.layout.towers)
    cut.load_state_dict({**state, "head.weight": state["head.weight"][31744:32000]})
    for n in (0, 1):
        expected, found = golden.policy.act(golden.inputs(n)), cut.act(golden.inputs(n))
        assert found.logits is not None
        assert expected.logits is not None
        assert found.logits.shape[-1] == 256
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.actions, expected.actions)
        torch.testing.assert_close(found.logits, expected.logits[..., 31744:32000], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDENS)
def test_manifest_alone_rebuilds_the_policy(goldens: dict[str, Golden], tiny_manifest: Any, name: str) -> None:
    golden = goldens[name]
    described = replace(tiny_manifest, policy=golden.spec, towers=golden.layout.towers)
    manifest = from_json(json.loads(json.dumps(to_json(described))))
    policy = families.build(manifest.policy, manifest.towers)
    policy.load_state_dict(golden.policy.state_dict())
    inputs = golden.inputs(0)
    assert torch.equal(policy.eval().act(inputs).actions, golden.policy.act(inputs).actions)


def test_what_no_action_depends_on_is_not_read(goldens: dict[str, Golden]) -> None:
    """The last block, the norm and the pooling head of SigLIP (12 + 2 + 13), DINOv2's (14 + 2); L1 heads: lm_head."""
    counts = {name: len(golden.layout.unused) for name, golden in goldens.items()}
    assert counts == {"openvla": 43, "openvla-oft-l1": 44, "openvla-oft-discrete": 43}
    unused = set(goldens["openvla-oft-l1"].layout.unused)
    assert {"language_model.lm_head.weight", "vision_backbone.fused_featurizer.attn_pool.latent"} <= unused
    assert "vision_backbone.featurizer.blocks.2.ls1.scale_factor" in unused
    assert not any(".blocks.1." in name for name in unused)


@pytest.mark.parametrize(
    ("name", "family", "unused"), [("openvla-7b", "openvla", 43), ("openvla-oft-7b", "openvla-oft", 44)]
)
def test_real_dimensions(name: str, family: str, unused: int) -> None:
    folder, options = geometry.folder(name)
    assert len(folder.tensors) == 982
    assert sum(folder.tensors.meta(tensor).numel() for tensor in folder.tensors) == 7_541_237_184
    layout = reader.layout(folder, options)
    policy = reader.build(layout)
    reader.check(folder, layout, policy)
    assert layout.spec.family == family
    assert len(layout.unused) == unused
    assert [len(tower.layers) for tower in layout.towers.values()] == [32, 23, 26]
    assert {layer.heads for tower in layout.towers.values() for layer in tower.layers} == {16, 32}
    assert layout.towers["decoder"].eps == 1e-6
