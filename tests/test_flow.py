"""pi0, pi0.5 and SmolVLA: lerobot's own numbers on goldens, every way their folders are saved, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrc.artifact import LayerSpec, PolicySpec
from rlrc.compressor.checkpoints import geometry, reader
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.models.families import build
from rlrc.compressor.models.flow import FlowPolicy
from rlrc.compressor.models.policy import Inputs
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import check, normalise, prepare, unnormalise
from rlrc.runtime.inference.prompts import Tokenizer

DATA = Path(__file__).parent / "data"
FAMILIES = ("pi0", "pi05", "smolvla")
TOKENIZER = {"pi0": "tokenizer", "pi05": "tokenizer", "smolvla": "tiny_smolvlm"}
BOTH = "model.paligemma_with_expert."
WITHOUT = ("policy_preprocessor.json", "policy_postprocessor.json")


@dataclass(frozen=True)
class Golden:
    arrays: Any
    inputs: Inputs  # of both observations, in one batch


@cache
def read_golden(family: str) -> tuple[FlowPolicy, Layout]:
    return read_folder(DATA / family / "checkpoint", family)


def read_folder(path: Path, family: str) -> tuple[FlowPolicy, Layout]:
    policy, layout = read(open_folder(path), ReadOptions(hints=read_hints(DATA / family / "golden.json")))
    assert isinstance(policy, FlowPolicy)
    return policy, layout


@cache
def golden(family: str) -> Golden:
    """The recorded observations as rlrc.runtime prepares them."""
    arrays, spec = np.load(DATA / family / "golden.npz"), read_golden(family)[0].spec
    recorded = json.loads((DATA / family / "golden.json").read_text())["observations"]
    assert spec.prompt is not None
    tokenizer, prepared = Tokenizer(DATA / family / TOKENIZER[family] / "tokenizer.json", spec.prompt), []
    for i, entry in enumerate(recorded):
        observation = {f"image.{camera}": arrays[f"obs{i}.image.{camera}"] for camera in entry["cameras"]}
        observation |= {"state": arrays[f"obs{i}.state"], "instruction": entry["instruction"]}
        check(observation, spec)
        prepared.append(prepare(observation, spec, tokenizer))
    lengths = np.array([len(one.ids) for one in prepared])
    ids = np.zeros((len(prepared), lengths.max()), np.int64)
    for row, one in zip(ids, prepared, strict=True):
        row[: len(one.ids)] = one.ids
    pixels = [torch.from_numpy(np.stack(camera)) for camera in zip(*(one.pixels for one in prepared), strict=True)]
    states = [one.state for one in prepared]
    state = None if states[0] is None else torch.from_numpy(np.stack(states))
    mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
    return Golden(arrays, Inputs(pixels, torch.from_numpy(ids), state, mask, torch.from_numpy(arrays["noise"])))


def act(policy: FlowPolicy, family: str) -> Tensor:
    with torch.no_grad():
        return policy.act(golden(family).inputs).actions


def close(found: Tensor | np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(np.asarray(found) - expected).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_every_array(family: str) -> None:
    """lerobot 0.6.1 on the same bf16 weights computed in float32.

    Measured at most 4.8e-6 in the prefix, 6.4e-6 in velocities, 2.5e-6 in actions.
    """
    policy, arrays, inputs = read_golden(family)[0], golden(family).arrays, golden(family).inputs
    spec, rows = policy.spec, range(len(golden(family).arrays["noise"]))
    assert spec.flow is not None
    assert spec.state is not None
    close(np.stack([x.permute(0, 3, 1, 2) for x in inputs.pixels], 1), arrays["pixel_values"])
    close(normalise(np.stack([arrays[f"obs{i}.state"] for i in rows]), spec.state.norm), arrays["state_normalized"])
    assert inputs.ids is not None
    assert inputs.mask is not None
    for i in rows:
        expected = arrays["input_ids"][i][arrays["attention_mask"][i]]
        assert inputs.ids[i][inputs.mask[i]].tolist() == expected.tolist()
    with torch.no_grad():
        seen = torch.stack([policy.encode_image(pixels) for pixels in inputs.pixels], 1)
        close(seen, arrays["vision_features"])
        embedded = policy.embed(seen.flatten(1, 2), inputs.ids, inputs.state)
        past, mask = policy.prefix(seen.flatten(1, 2), inputs.ids, inputs.mask, inputs.state)
        assert mask is not None
        for i in rows:
            real = arrays["prefix_pad_masks"][i]
            close(embedded[i][mask[i]], arrays["prefix_embs"][i][real])
            for name, block in (("kv0", past[0]), ("kvL", past[-1])):
                for tensor, which in zip(block, "kv", strict=True):
                    close(tensor[i].transpose(0, 1)[mask[i]], arrays[f"{name}_{which}"][i][real])
        x = torch.from_numpy(arrays["noise"])
        velocities = []
        for step, time in enumerate(arrays["timesteps"]):
            assert time == np.float32(1 - step / spec.flow.steps)
            t = torch.full((len(x),), 1 - step / spec.flow.steps)
            velocities.append(policy.velocity(past, mask, inputs.state, x, t))
            x = x - velocities[-1] / spec.flow.steps
    close(velocities[0], arrays["velocity_first"])
    close(velocities[-1], arrays["velocity_last"])
    actions = act(policy, family)
    close(actions, arrays["actions_normalized"])
    close(unnormalise(actions.numpy(), spec.action.norm), arrays["actions"])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_those_of_single_observations(family: str) -> None:
    policy, inputs, together = read_golden(family)[0], golden(family).inputs, act(read_golden(family)[0], family)
    assert inputs.ids is not None
    assert inputs.mask is not None
    for i in range(2):
        one = slice(i, i + 1)
        alone = Inputs(
            [pixels[one] for pixels in inputs.pixels],
            inputs.ids[one, : int(inputs.mask[i].sum())],
            None if inputs.state is None else inputs.state[one],
            noise=inputs.noise[one] if inputs.noise is not None else None,
        )
        with torch.no_grad():
            close(policy.act(alone).actions[0], together[i].numpy())


def test_noise_is_drawn_where_none_is_given() -> None:
    policy, inputs = read_golden("pi05")[0], replace(golden("pi05").inputs, noise=None)
    with torch.no_grad():
        actions = [policy.act(inputs).actions for _ in range(2)]
    assert actions[0].shape == (2, 10, 7)
    assert not torch.equal(*actions)


def test_a_manifest_rebuilds_the_policy() -> None:
    """geometry and towers say everything, as JSON values too."""
    policy = read_golden("smolvla")[0]
    spec = replace(policy.spec, geometry=json.loads(json.dumps(policy.spec.geometry)))
    again = build(spec, policy.towers)
    again.load_state_dict(policy.state_dict())
    assert isinstance(again, FlowPolicy)
    assert torch.equal(act(again, "smolvla"), act(policy, "smolvla"))
    with pytest.raises(UserError, match='geometry of family "'):
        build(replace(spec, geometry={**spec.geometry, "patches": 3}), policy.towers)


def test_norms_by_tables_of_the_steps_give_the_same_actions() -> None:
    policy = read_golden("pi05")[0]
    tower = policy.towers["expert"]
    steps = policy.spec.flow.steps
    condition = policy.condition(torch.tensor([1 - i / steps for i in range(steps)]))
    state = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("time_")}
    for name in [name.removesuffix(".dense.weight") for name in state if name.endswith(".dense.weight")]:
        weight, bias = state.pop(f"{name}.dense.weight"), state.pop(f"{name}.dense.bias")
        state[f"{name}.table"] = condition @ weight.float().T + bias
    tables = build(policy.spec, {**policy.towers, "expert": replace(tower, norm="steps")})
    tables.load_state_dict(state)
    assert isinstance(tables, FlowPolicy)
    close(act(tables, "pi05"), act(policy, "pi05").numpy())

    inputs, x = golden("pi05").inputs, torch.from_numpy(golden("pi05").arrays["noise"])
    with torch.no_grad():
        past, mask = tables.prefix(tables.encode_image(inputs.pixels[0]), inputs.ids, inputs.mask)
        by_time = tables.velocity(past, mask, None, x, torch.tensor([0.7, 0.7]))
        assert torch.equal(by_time, tables.velocity(past, mask, None, x, torch.tensor([3, 3])))
        close(policy.velocity(past, mask, None, x, torch.tensor([3, 3])), by_time.numpy())


def copied(
    family: str, path: Path, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **changes: Any
) -> Path:
    """The golden folder with other tensors; ``changes`` replace entries of config.json."""
    shutil.copytree(DATA / family / "checkpoint", path)
    save_file(tensors(load_file(path / "model.safetensors")), path / "model.safetensors")
    edit(path, "config.json", lambda config: config.update(changes))
    return path


def edit(path: Path, file: str, change: Callable[[Any], object]) -> None:
    values = json.loads((path / file).read_text())
    change(values)
    (path / file).write_text(json.dumps(values))


def renamed(pattern: str, replacement: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


def head_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As files derived from openpi: the language model's head stands for the embedding."""
    embedding = tensors.pop(f"{BOTH}paligemma.model.language_model.embed_tokens.weight")
    return tensors | {f"{BOTH}paligemma.lm_head.weight": embedding}


def with_leftovers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """pi0's state and plain norms in a file of pi0.5, which lerobot skips."""
    norms = {f"{BOTH}gemma_expert.model.layers.{i}.input_layernorm.weight": torch.ones(24) for i in range(3)}
    state = {"model.state_proj.weight": torch.ones(24, 32), "model.state_proj.bias": torch.ones(24)}
    return tensors | norms | state | {f"{BOTH}gemma_expert.model.norm.weight": torch.ones(24)}


@pytest.mark.parametrize(
    ("family", "tensors"),
    [
        ("pi0", renamed("^model[.]", "")),
        ("pi0", renamed("action_time_mlp", "time_mlp")),
        ("pi0", head_only),
        ("pi0", lambda tensors: head_only(renamed("^model[.](?!paligemma_with_expert.paligemma)", "")(tensors))),
        ("pi05", renamed("[.]time_mlp", ".action_time_mlp")),
        ("pi05", with_leftovers),
        ("smolvla", renamed("^model[.]", "model._orig_mod.")),
        ("smolvla", lambda tensors: {name: value for name, value in tensors.items() if "lm_head" not in name}),
    ],
    ids=["no-prefix", "time", "head-only", "openpi", "time", "leftovers", "compiled", "no-head"],
)
def test_other_names_of_the_same_tensors(family: str, tensors: Callable[..., Any], tmp_path: Path) -> None:
    policy, _ = read_folder(copied(family, tmp_path / "folder", tensors), family)
    assert torch.equal(act(policy, family), act(read_golden(family)[0], family))


def test_sharded_folder(tmp_path: Path) -> None:
    path = copied("smolvla", tmp_path / "folder")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        weight_map |= dict.fromkeys(names[i::3], shard)
        save_file({name: tensors[name] for name in names[i::3]}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    policy, _ = read_folder(path, "smolvla")
    assert torch.equal(act(policy, "smolvla"), act(read_golden("smolvla")[0], "smolvla"))


@pytest.mark.parametrize("family", ["pi0", "smolvla"])
def test_old_folder_with_statistics_among_the_weights(family: str, tmp_path: Path) -> None:
    """As lerobot before 0.4 saved them: no processor files, statistics as buffers of the policy."""
    path = tmp_path / "folder"
    stored = load_file(next((DATA / family / "checkpoint").glob("policy_pre*.safetensors")))

    def with_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        places = {
            "normalize_inputs": "observation.state",
            "normalize_targets": "action",
            "unnormalize_outputs": "action",
        }
        return tensors | {
            f"{place}.buffer_{feature.replace('.', '_')}.{statistic}": stored[f"{feature}.{statistic}"].clone()
            for place, feature in places.items()
            for statistic in ("mean", "std")
        }

    copied(family, path, with_buffers)
    for file in WITHOUT:
        (path / file).unlink()
    policy, layout = read_folder(path, family)
    expected = read_golden(family)[0].spec
    assert policy.spec.state == expected.state
    assert policy.spec.action == expected.action
    assert policy.spec.prompt == replace(expected.prompt, truncate=False)
    assert "normalize_inputs.buffer_observation_state.mean" in layout.unused
    assert torch.equal(act(policy, family), act(read_golden(family)[0], family))

    save_file(load_file(DATA / family / "checkpoint" / "model.safetensors"), path / "model.safetensors")
    with pytest.raises(UserError, match=r"expected statistics of action in .* MEAN_STD, found none in the weights"):
        read_folder(path, family)


def test_unused_are_named() -> None:
    """Heads, pooling, and of the prefix's last block everything but keys and values; nothing else."""
    unused = set(read_golden("pi0")[1].unused)
    last = f"{BOTH}paligemma.model.language_model.layers.2."
    vision = f"{BOTH}paligemma.model.vision_tower.vision_model.head."
    assert {f"{BOTH}gemma_expert.lm_head.weight", f"{BOTH}paligemma.lm_head.weight"} < unused
    assert {name.removeprefix(last) for name in unused if name.startswith(last)} == {
        *("self_attn.q_proj.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight"),
        *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    }
    assert f"{BOTH}paligemma.model.language_model.norm.weight" in unused
    assert len([name for name in unused if name.startswith(vision)]) == 11 == len(unused) - 9


def test_blocks_of_the_prefix_that_serve_no_expert_block_are_unused(tmp_path: Path) -> None:
    """Two expert blocks for four of the prefix: the third one's keys are the last that are read."""
    experts = "model.vlm_with_expert.lm_expert.layers."

    def fewer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in tensors.items() if not name.startswith((f"{experts}2", f"{experts}3"))}

    path = copied("smolvla", tmp_path / "folder", fewer, num_expert_layers=2, self_attn_every_n_layers=4)
    policy, layout = read_folder(path, "smolvla")
    assert [layer.kind for layer in policy.towers["decoder"].layers] == ["self", "self", "half"]
    assert [layer.kind for layer in policy.towers["expert"].layers] == ["self", "cross"]
    assert len([name for name in layout.unused if "text_model.layers.3." in name]) == 9


@pytest.mark.parametrize(
    ("family", "tensors", "numbers", "unused"),
    [
        ("pi0", 778, 4_028_019_472, 899_026_944),
        ("pi05", 813, 4_143_404_816, 899_026_944),
        ("smolvla", 500, 450_046_176, 56_526_720),
    ],
)
def test_real_geometry(family: str, tensors: int, numbers: int, unused: int) -> None:
    """No hints: the tables know the official heads. Numbers are sums over shapes by hand."""
    folder, options = geometry.folder(family)
    layout = reader.layout(folder, options)
    policy = reader.build(layout)
    reader.check(folder, layout, policy)
    decoder, expert, vision = (layout.towers[name].layers for name in ("decoder", "expert", "vision"))
    if family == "smolvla":
        assert decoder[0] == LayerSpec(15, 5, 64, 2560)
        assert [layer.kind for layer in expert] == ["self", "cross"] * 8
        assert vision == (LayerSpec(12, 12, 64, 3072),) * 12
    else:
        assert decoder == (LayerSpec(8, 1, 256, 16384),) * 17 + (LayerSpec(8, 1, 256, 16384, "half"),)
        assert expert == (LayerSpec(8, 1, 256, 4096),) * 18
        assert vision == (LayerSpec(16, 16, 72, 4304),) * 27
    sizes = {name: prod(folder.tensors.shape(name)) for name in folder.tensors}
    assert (len(sizes), sum(sizes.values())) == (tensors, numbers)
    assert sum(sizes[name] for name in layout.unused) == unused
    assert sum(parameter.numel() for parameter in policy.parameters()) == numbers - unused


def test_pictures_of_the_config(tmp_path: Path) -> None:
    cameras = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 48, 64]} for name in ("b", "a")}
    state = {"observation.state": {"type": "STATE", "shape": [6]}}
    path = copied("smolvla", tmp_path / "folder", input_features=state | cameras, resize_imgs_with_padding=None)
    with pytest.raises(UserError, match=r"expected pictures of 64 x 64 pixels.*found 48 x 64"):
        read_folder(path, "smolvla")
    edit(path, "config.json", lambda c: [c["input_features"][name].update(shape=[3, 64, 70]) for name in cameras])
    spec: PolicySpec = read_folder(path, "smolvla")[0].spec
    # 70 columns hold four patches of 16; in the config's order; one may be missing.
    assert [(c.name, c.height, c.width, c.resize, c.optional) for c in spec.cameras] == [
        ("b", 64, 70, "none", True),
        ("a", 64, 70, "none", True),
    ]
    with pytest.raises(UserError, match="no picture"):
        check({"state": np.zeros(6, np.float32), "instruction": "go"}, spec)


def test_pictures_normalised_by_statistics_are_refused(tmp_path: Path) -> None:
    """lerobot would pad after normalising: rlrc's black borders would be others."""
    path = copied("pi0", tmp_path / "folder")
    (stored,) = path.glob("policy_pre*.safetensors")
    colours = {f"observation.images.top.{name}": torch.full((3, 1, 1), 0.25) for name in ("mean", "std")}
    save_file({**load_file(stored), **colours}, stored)
    read_folder(path, "pi0")  # they are not used
    edit(
        path, "policy_preprocessor.json", lambda file: file["steps"][6]["config"]["norm_map"].update(VISUAL="MEAN_STD")
    )
    with pytest.raises(UserError, match=r"expected pictures normalised by IDENTITY, found .* observation.images.top"):
        read_folder(path, "pi0")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("pi0", {"use_relative_actions": True}, "expected use_relative_actions to be false"),
        ("smolvla", {"adapt_to_pi_aloha": True}, "expected adapt_to_pi_aloha to be false"),
        ("pi0", {"proj_width": 1024}, "expected pi0 as lerobot 0.4 and later save it"),
        ("pi0", {"image_resolution": [96, 96]}, "expected pictures of 64 x 64 pixels.* found 96 x 96"),
        ("pi0", {"image_resolution": 64}, "expected two numbers of pixels to resize to"),
        ("pi0", {"max_state_dim": 16}, r"expected \(24, 16\) for tensor model.state_proj.weight, found \(24, 32\)"),
        ("pi0", {"max_action_dim": 5}, "expected at most max_action_dim = 5 numbers of an action"),
        ("pi0", {"chunk_size": "8"}, "expected a positive whole number up to 1,000,000 as chunk_size"),
        ("pi0", {"min_period": None}, "expected a number as min_period"),
        ("pi0", {"input_features": {}}, "expected a VISUAL in input_features"),
        ("pi0", {"input_features": []}, "expected names with type and shape as input_features"),
        ("pi0", {"type": "pi05"}, "expected policy_preprocessor.json to make a prompt for pi05"),
        ("smolvla", {"num_vlm_layers": 16}, "expected 16 blocks in the prefix and 4 in the expert.* found 4 and 4"),
        ("smolvla", {"num_expert_layers": 2}, "expected 4 blocks in the prefix and 2 in the expert"),
        (
            "smolvla",
            {"self_attn_every_n_layers": 3},
            r"expected \(16, 16\) for tensor .*lm_expert.layers.2.self_attn.k_",
        ),
    ],
)
def test_refused_configs(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_folder(copied(family, tmp_path / "folder", **changes), family)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("model.state_proj.bias"), "expected the tensor model.state_proj.bias"),
        (
            without(f"{BOTH}gemma_expert.model.layers.0.self_attn.q_proj.weight"),
            "expected the tensor .*0.self_attn.q_proj",
        ),
        (
            lambda tensors: tensors | {"model.lora.weight": torch.ones(2)},
            "found 1 tensors .*such as model.lora.weight",
        ),
        (renamed(r"gemma_expert[.]model[.]layers[.]2", "x"), "expected 3 blocks in the prefix and 3 in the expert"),
        (
            lambda tensors: tensors | {"model.action_in_proj.bias": torch.ones(5)},
            r"expected \(24,\) for .*action_in_proj.bias",
        ),
    ],
)
def test_refused_tensors(tensors: Callable[..., Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_folder(copied("pi0", tmp_path / "folder", tensors), "pi0")


@pytest.mark.parametrize(
    ("family", "hints", "message"),
    [
        ("pi0", {}, "divides the 24 channels of the vision encoder .* give vision.num_attention_heads with --hints"),
        ("pi0", {"vision": {"num_attention_heads": 5}}, "divides the 24 channels of the vision encoder .* found 5"),
        (
            "pi0",
            {"vision": {"num_attention_heads": "2"}},
            "expected a positive whole number as vision.num_attention_heads",
        ),
        (
            "pi0",
            {"vision": {"num_attention_heads": 2}},
            "expected 8 query and 1 key/value heads of 256 .* give vlm.num_heads",
        ),
        (
            "smolvla",
            {"vision": {"num_attention_heads": 2}},
            "expected vlm_model_name to be one of .* give text.num_attention",
        ),
    ],
)
def test_heads_that_nothing_tells(family: str, hints: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(open_folder(DATA / family / "checkpoint"), ReadOptions(hints=hints))


def test_hints_that_contradict_each_other() -> None:
    hints = read_hints(DATA / "pi0" / "golden.json")
    expert = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 8}
    with pytest.raises(UserError, match=r"expected the same key/value heads .* found 1 of 16 and 2 of 8"):
        read(open_folder(DATA / "pi0" / "checkpoint"), ReadOptions(hints={**hints, "expert": expert}))
