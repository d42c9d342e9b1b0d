"""Lossless cuts: the same actions as before on the goldens of every family, and counts that were made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlrc import artifact as artifacts
from rlrc.artifact import Manifest
from rlrc.compressor.checkpoints import geometry, reader
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.models.families import build
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.storage.tensors import tensors_from_shapes
from rlrc.compressor.prune.lossless import Cut, count_outside, cut_lossless, format_report, list_unread
from rlrc.compressor.stages.artifact_io import load_policy
from rlrc.runtime.cli import main
from rlrc.runtime.inference.pictures import to_pixels
from rlrc.runtime.inference.preprocess import normalise

DATA = Path(__file__).parent / "data"
FAMILIES = ("act", "openvla", "openvla-oft-l1", "openvla-oft-discrete", "pi0", "pi05", "smolvla")


@cache
def golden(name: str) -> tuple[PolicyModule, tuple[Cut, ...]]:
    folder = open_folder(DATA / name / "checkpoint")
    hints = read_hints(DATA / name / "golden.json")
    key = json.loads((DATA / name / "golden.json").read_text())["observations"][0].get("unnorm_key")
    policy, layout = read(folder, ReadOptions(hints=hints, unnorm_key=key))
    return policy, tuple(list_unread(folder.tensors, layout.unused))


def observations(name: str, policy: PolicyModule) -> list[Inputs]:
    """The golden's two, one at a time."""
    found = []
    with np.load(DATA / name / "golden.npz") as arrays:
        for i in range(2):
            shots = {k.removeprefix(f"obs{i}.").removeprefix("image."): v for k, v in arrays.items() if v.ndim == 3}
            pixels = [
                torch.from_numpy(to_pixels(shots[c.name], c))[None] for c in policy.spec.cameras if c.name in shots
            ]
            ids = state = noise = None
            if f"obs{i}.input_ids" in arrays:
                ids = arrays[f"obs{i}.input_ids"][0]
                ids = torch.tensor([*ids, 29871] if ids[-1] != 29871 else ids)[None]
            elif "input_ids" in arrays:
                mask = arrays["attention_mask"][i].astype(bool)
                ids, noise = (
                    torch.from_numpy(arrays["input_ids"][i][mask])[None],
                    torch.from_numpy(arrays["noise"][[i]]),
                )
            if policy.spec.state is not None:
                state = torch.from_numpy(normalise(arrays[f"obs{i}.state"], policy.spec.state.norm))[None]
                missing = (policy.spec.state.width or state.shape[1]) - state.shape[1]
                state = torch.nn.functional.pad(state, (0, missing))
            found.append(Inputs(pixels, ids, state, noise=noise))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_same_actions(name: str) -> None:
    policy, unread = golden(name)
    cut, report = cut_lossless(policy, unread)
    action = cut.spec.action
    for i, inputs in enumerate(observations(name, policy)):
        with torch.no_grad():
            before, after = policy.act(inputs), cut.act(inputs)
        if before.tokens is not None and after.tokens is not None:
            assert torch.equal(before.tokens, after.tokens)
            assert torch.equal(before.actions, after.actions)
            assert before.logits is not None
            assert after.logits is not None
            assert after.logits.shape[-1] == 256
            assert torch.allclose(before.logits[..., 31744:32000], after.logits, atol=1e-6, rtol=1e-5)
            assert count_outside(before.tokens.numpy(), action) == 0
        else:
            assert (before.actions - after.actions).abs().max() <= 1e-6
        with np.load(DATA / name / "golden.npz") as arrays:  # and they are the reference's
            if "actions_normalized" in arrays:
                assert np.abs(after.actions[0].numpy() - arrays["actions_normalized"][i]).max() < 1e-5
            elif f"obs{i}.tokens" in arrays:
                assert after.tokens is not None
                assert after.tokens.flatten().tolist() == arrays[f"obs{i}.tokens"].tolist()
    left = {"parameters": sum(tensor.numel() for tensor in cut.state_dict().values())}
    for unit in ("parameters", "bytes"):
        before_all, after_all = report[unit]["before"], report[unit]["after"]
        assert before_all - after_all == sum(entry[unit] for entry in report["cuts"])
        assert left.get(unit, after_all) == after_all


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_policy_is_rebuilt_from_its_manifest_and_cut_no_further(name: str) -> None:
    cut, _ = cut_lossless(golden(name)[0])
    manifest = Manifest(cut.spec, cut.towers, 1, "float32")
    manifest = artifacts.from_json(json.loads(json.dumps(artifacts.to_json(manifest))))
    again = build(manifest.policy, manifest.towers)
    again.load_state_dict(cut.state_dict())
    twice, report = cut_lossless(again)
    assert report["cuts"] == []
    assert {k: v.shape for k, v in twice.state_dict().items()} == {k: v.shape for k, v in cut.state_dict().items()}


def test_the_whole_file_is_accounted_for() -> None:
    """Nothing of an official folder is both read and reported as never read, and nothing is neither."""
    for name in ("act", "openvla", "pi0", "smolvla"):
        folder = open_folder(DATA / name / "checkpoint")
        stored = sum(folder.tensors.meta(tensor).numel() for tensor in folder.tensors)
        policy, unread = golden(name)
        assert cut_lossless(policy, unread)[1]["parameters"]["before"] == stored


# By hand, in bfloat16 but for tables, which are computed in float32.
COUNTS = {
    # 32064 - 256 rows of 16.
    "openvla": {"rows of the head that are no action tokens": (31808 * 16, 31808 * 16 * 2)},
    "openvla-oft-discrete": {"rows of the head that are no action tokens": (31808 * 16, 31808 * 16 * 2)},
    # The whole head, 32064 x 16, which the regression head makes superfluous.
    "openvla-oft-l1": {"language_model.lm_head, never read": (32064 * 16, 32064 * 16 * 2)},
    # Seven norms of width 24, each a layer 24 -> 72, and two layers 24 -> 24; seven tables of ten steps.
    "pi05": {
        "layers that make the norms' modulations": (
            7 * (72 * 24 + 72) + 2 * (24 * 24 + 24) - 7 * 10 * 72,
            (7 * (72 * 24 + 72) + 2 * (24 * 24 + 24)) * 2 - 7 * 10 * 72 * 4,
        )
    },
    # Four layers 32 -> 32, of which one vector remains.
    "act": {
        "the decoder's first self-attention, a constant": (
            4 * (32 * 32 + 32) - 32,
            4 * (32 * 32 + 32) * 2 - 32 * 4,
        ),
        # One block with an MLP of 64 and two norms.
        "model.vae_encoder, never read": (
            4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32,
            (4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32) * 2,
        ),
    },
    "pi0": {"model.paligemma_with_expert.gemma_expert.lm_head, never read": (512 * 24, 512 * 24 * 2)},
    "smolvla": {"model.vlm_with_expert.vlm.lm_head, never read": (320 * 48, 320 * 48 * 2)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_by_hand(name: str) -> None:
    report = cut_lossless(*golden(name))[1]
    found = {cut["what"]: (cut["parameters"], cut["bytes"]) for cut in report["cuts"]}
    for what, count in COUNTS[name].items():
        assert found[what] == count
    own = [what for what in found if not what.endswith("never read")]
    assert own == [what for what in COUNTS[name] if not what.endswith("never read")]


def test_float32_weights_keep_their_four_bytes() -> None:
    policy, _ = golden("openvla")
    wide = build(policy.spec, policy.towers)
    wide.load_state_dict({name: tensor.float() + 1e-4 for name, tensor in policy.state_dict().items()})
    (cut,) = cut_lossless(wide)[1]["cuts"]
    assert cut["bytes"] == 31808 * 16 * 4


def test_only_where_another_token_wins_is_the_action_another() -> None:
    """Token 5 is made to win in the second observation alone."""
    policy, _ = golden("openvla-oft-discrete")
    both = observations("openvla-oft-discrete", policy)
    changed = build(policy.spec, policy.towers).eval()
    changed.load_state_dict(policy.state_dict())
    with torch.no_grad():
        first, second = (policy.hidden(policy.encode_image(x.pixels[0]), x.ids, None, None)[0] for x in both)
        rows = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
        fits = ((rows @ first.T).amax(1) < 0) & ((rows @ second.T).amax(1) > 0)
        changed.head.weight[5] = 1e4 * rows[fits][0]
        before = [changed.act(inputs) for inputs in both]
        after = [cut_lossless(changed)[0].act(inputs) for inputs in both]
    tokens = np.concatenate([output.tokens.numpy() for output in before if output.tokens is not None])
    assert count_outside(tokens[:1], changed.spec.action) == 0
    assert count_outside(tokens, changed.spec.action) == 1
    assert torch.equal(before[0].actions, after[0].actions)
    others = torch.from_numpy(tokens[1:] == 5)
    assert torch.equal(before[1].actions[~others], after[1].actions[~others])
    assert not torch.equal(before[1].actions, after[1].actions)


def test_outside_counts_observations() -> None:
    action = golden("openvla")[0].spec.action
    tokens = np.full((4, 1, 7), 31900)
    tokens[1, 0, 6] = 31743  # one below the first action token
    tokens[2, 0, :] = 32000  # one above the last
    tokens[3, 0, 0], tokens[3, 0, 1] = 31744, 31999
    assert count_outside(tokens, action) == 2
    assert count_outside(tokens, replace(action, tokens=None)) == 0


def test_never_read_names_whole_modules() -> None:
    stored = tensors_from_shapes(
        "here", {"a.b.x.weight": (2, 3), "a.b.x.bias": (2,), "a.b.y.weight": (5,), "a.c.weight": (7,)}
    )
    assert list_unread(stored, ["a.b.x.weight", "a.b.x.bias", "a.b.y.weight"]) == [Cut("a.b, never read", 13, 26)]
    assert list_unread(stored, ["a.b.x.bias", "a.c.weight"]) == [
        Cut("a.b.x.bias, never read", 2, 4),
        Cut("a.c, never read", 7, 14),
    ]


def test_the_report_on_screen() -> None:
    report = {
        "cuts": [{"what": "a.b, never read", "parameters": 1300, "bytes": 2600}],
        "parameters": {"before": 10_000, "after": 8700},
        "bytes": {"before": 20_000, "after": 17_400},
        "outside": {"observations": 4, "changed": 1},
    }
    assert format_report(report) == [
        "a.b, never read: 1,300 parameters, 2,600 bytes",
        "10,000 parameters -> 8,700, 20,000 bytes -> 17,400 (13.0% less)",
        "the likeliest token of the whole vocabulary was no action token in 1 of 4 golden observations: only there the "
        "action may differ",
    ]


@pytest.mark.parametrize("name", ["act", "openvla"])
def test_prune_lossless_writes_an_artifact_with_the_same_actions(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the official folder; the report's bytes are those of the file."""
    flags = ["--hints", str(DATA / name / "golden.json")]
    flags += ["--unnorm-key", "bridge_orig"] if name == "openvla" else []
    assert main(["prune", str(DATA / name / "checkpoint"), str(tmp_path / "cut"), "--lossless", *flags]) == 0
    screen = capsys.readouterr().out
    assert "% less)" in screen
    assert ("no action token in 0 of 4 golden observations" in screen) == (name == "openvla")

    cut = artifacts.load(tmp_path / "cut")
    policy, unread = golden(name)
    report = cut.manifest.history[-1].after["lossless"]
    expected = cut_lossless(policy, unread)[1]
    assert {key: report[key] for key in expected} == expected
    assert report.get("outside") == ({"observations": 4, "changed": 0} if name == "openvla" else None)
    stored = load_file(cut.file("weights/model.safetensors"))
    assert sum(tensor.nbytes for tensor in stored.values()) == report["bytes"]["after"]
    loaded = load_policy(cut)
    for inputs in observations(name, policy):
        with torch.no_grad():
            assert (policy.act(inputs).actions - loaded.act(inputs).actions).abs().max() <= 1e-6


def test_prune_lossless_refuses_an_int4_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(DATA / "act" / "checkpoint"), str(tmp_path / "int4")]) == 0
    assert main(["prune", str(tmp_path / "int4"), str(tmp_path / "cut"), "--lossless"]) == 2
    assert "expected an unquantized artifact, found int4" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("name", "left"),
    [
        # Without a vision block and its norm twice, SigLIP's pooling head, 31,808 rows of 4096.
        ("openvla-7b", 7_541_237_184 - 12_600_320 - 15_241_808 - 15_238_352 - 31_808 * 4096),
        # 37 norms 1024 -> 3072 and two layers 1024 -> 1024 become 37 tables of ten steps.
        ("pi05", 3_244_377_872 - 37 * 1025 * 3072 - 2 * 1025 * 1024 + 37 * 10 * 3072),
        # 34,215,758 parameters and 19,200 statistics, four layers of which become a vector.
        ("act", 34_215_758 + 19_200 - 4 * 513 * 512 + 512),
    ],
)
def test_real_dimensions(name: str, left: int) -> None:
    """On the meta device."""
    folder, options = geometry.folder(name)
    layout = reader.layout(folder, options)
    files = reader.sources(folder, layout).values()
    stored = sum(tensors.meta(tensor).numel() for tensors in files for tensor in tensors)
    unread = list_unread(folder.tensors, layout.unused)
    report = cut_lossless(reader.build(layout), unread)[1]
    assert report["parameters"] == {"before": stored, "after": left}
