"""Every key of a folder's configuration files is used, known to change no action, or refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from families import DATA, FAMILIES, flags
from rlrc.compressor.checkpoints import folder as official
from rlrc.compressor.checkpoints import reader
from rlrc.compressor.checkpoints.folder import open_folder, options_of
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.errors import UserError


def edited(family: str, target: Path, file: str = "config.json", section: str = "", **values: Any) -> Path:
    folder = shutil.copytree(DATA / family / "checkpoint", target)
    config = json.loads((folder / file).read_text())
    (config[section] if section else config).update(values)
    (folder / file).write_text(json.dumps(config))
    return folder


def layout_of(folder: Path, family: str, **hints: Any) -> Layout:
    opened, options = open_folder(folder), options_of(flags(family))
    options = official.ReadOptions({**options.hints, **hints}, options.unnorm_key, options.images, options.tokenizer)
    layout: Layout = reader.layout(opened, options)
    reader.check(opened, layout, reader.build(layout))
    return layout


@pytest.mark.parametrize("value", [[1], {"a": [1]}, -1, pytest.param(10**400, id="huge"), True])
@pytest.mark.parametrize(
    ("family", "file", "section", "key"),
    [
        ("act", "config.json", "", "vision_backbone"),
        ("act", "config.json", "", "n_encoder_layers"),
        ("act", "config.json", "normalization_mapping", "STATE"),
        ("openvla", "config.json", "", "image_resize_strategy"),
        ("openvla", "config.json", "text_config", "rope_theta"),
        ("openvla", "config.json", "text_config", "rope_scaling"),
        ("openvla", "config.json", "text_config", "rope_parameters"),
        ("openvla", "preprocessor_config.json", "", "interpolations"),
        ("openvla", "preprocessor_config.json", "", "input_sizes"),
        ("openvla", "preprocessor_config.json", "", "tvf_normalize_params"),
    ],
)
def test_values_of_another_type(tmp_path: Path, family: str, file: str, section: str, key: str, value: Any) -> None:
    """A value that is refused or without effect, never a traceback."""
    folder = edited(family, tmp_path / "folder", file, section, **{key: value})
    if section == "normalization_mapping":
        for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
            (folder / name).unlink()  # else the modes are theirs
    with contextlib.suppress(UserError):
        layout_of(folder, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_nobody_knows(tmp_path: Path, family: str) -> None:
    folder = edited(family, tmp_path / "folder", use_sigmoid_attention=False, a_new_thing=None)
    message = r"settings that rlrc knows in config.json, found use_sigmoid_attention = False; .*\"ignore\".*--hints"
    with pytest.raises(UserError, match=message) as caught:
        layout_of(folder, family)
    assert "\n" not in str(caught.value)
    assert layout_of(folder, family, ignore=["use_sigmoid_attention"]) == layout_of(
        DATA / family / "checkpoint", family
    )
    for ignored in ("use_sigmoid_attention", "no_use_sigmoid_attention", {"use_sigmoid_attention": True}):
        with pytest.raises(UserError, match="expected a list of names of settings as the hint ignore, found"):
            layout_of(folder, family, ignore=ignored)


@pytest.mark.parametrize(
    ("family", "hint"),
    [("pi0", {"rope_theta": 0}), ("pi05", {"vlm_rms_eps": -1e-6}), ("smolvla", {"rope_theta_used": -1.0})],
)
def test_hints_that_cannot_be(family: str, hint: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"expected positive numbers as eps and rope_theta of .*; correct the hints"):
        layout_of(DATA / family / "checkpoint", family, **hint)


@pytest.mark.parametrize(
    ("family", "section", "values", "message"),
    [
        ("openvla", "text_config", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.*yarn"),
        ("openvla", "text_config", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ("openvla", "text_config", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("openvla", "text_config", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ("openvla", "text_config", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "10000.0 and .*500000"),
        ("openvla", "text_config", {"mlp_bias": True}, "mlp_bias to be false in text_config.*found true"),
        ("openvla", "text_config", {"attention_bias": True}, "without attention_bias"),
        ("openvla", "text_config", {"sliding_window": 512}, "sliding_window to be null .*found 512"),
        ("openvla", "text_config", {"attn_logit_softcapping": 50.0}, "found attn_logit_softcapping = 50.0"),
        ("openvla", "text_config", {"head_dim": 4}, r"expected \(8, 16\) for tensor .*_proj"),
        ("openvla", "", {"timm_override_act_layers": ["quick_gelu", None]}, "timm_override_act_layers"),
        ("openvla", "", {"image_resize_strategy": "letterbox"}, "resize-naive.*'resize-naive' and 'letterbox'"),
        ("openvla", "", {"repetition_penalty": 1.2}, "repetition_penalty to be 1.0 in config.json, found 1.2"),
        ("openvla-oft-l1", "text_config", {"rope_parameters": {"rope_type": "linear", "factor": 2}}, "linear"),
        ("act", "", {"n_obs_steps": 2}, "n_obs_steps to be 1 in config.json, found 2"),
        ("act", "", {"use_peft": True}, "use_peft to be false"),
        ("act", "", {"use_film": True}, "found use_film = True"),
        ("pi0", "", {"use_relative_actions": True}, "use_relative_actions to be false"),
        ("pi05", "", {"state_cond": True}, "found state_cond = True"),
        ("smolvla", "", {"add_image_special_tokens": True}, "add_image_special_tokens to be false"),
        ("smolvla", "", {"rope_theta": 1e5}, "found rope_theta = 100000.0"),
    ],
)
def test_what_would_change_the_actions(
    tmp_path: Path, family: str, section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        layout_of(edited(family, tmp_path / "folder", section=section, **values), family)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("generation_config.json", {"repetition_penalty": 1.1}, "repetition_penalty to be 1.0 in generation_config"),
        ("generation_config.json", {"suppress_tokens": [31900]}, "suppress_tokens to be null in generation_config"),
        ("preprocessor_config.json", {"tvf_do_letterbox": True}, "tvf_do_letterbox to be false"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop = True"),
        ("preprocessor_config.json", {"input_sizes": [[3, 224, 224]] * 2}, r"input_sizes \[3, 56, 56\]"),
        ("preprocessor_config.json", {"tvf_crop_params": [{"output_size": [48, 48]}] * 2}, "tvf_crop_params"),
        (
            "preprocessor_config.json",
            {"tvf_resize_params": [{"antialias": False, "interpolation": 3, "max_size": None, "size": [56, 56]}] * 2},
            "tvf_resize_params.*'antialias': False",
        ),
    ],
)
def test_other_configuration_files(tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout_of(edited("openvla", tmp_path / "folder", file, **values), "openvla")


@pytest.mark.parametrize("theta", [500_000.0, 10_000.0])
@pytest.mark.parametrize(
    "written",
    [
        lambda theta: {"rope_theta": theta},
        lambda theta: {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "rope_scaling": None},
        lambda theta: {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}},
        lambda theta: {"rope_theta": theta, "rope_scaling": {"type": "default"}},
    ],
)
def test_the_base_of_rotary_positions_by_every_version(tmp_path: Path, theta: float, written: Any) -> None:
    folder = edited("openvla", tmp_path / "folder", section="text_config", **written(theta))
    assert layout_of(folder, "openvla").towers["decoder"].theta == theta


def test_what_transformers_writes_today(tmp_path: Path) -> None:
    """Every default of the installed version: nothing of it is refused, nothing changes."""
    from transformers import GenerationConfig, LlamaConfig

    folder = shutil.copytree(DATA / "openvla/checkpoint", tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    text = LlamaConfig(**config["text_config"]).to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "text_config": text, "dtype": "bfloat16"}))
    generation = GenerationConfig(do_sample=True, temperature=0.6).to_dict()
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert layout_of(folder, "openvla") == layout_of(DATA / "openvla/checkpoint", "openvla")


@pytest.mark.parametrize("family", ["openvla", "openvla-oft-l1", "act", "smolvla"])
@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ],
)
def test_quantized_folders(tmp_path: Path, family: str, quantization: dict[str, Any]) -> None:
    folder = edited(family, tmp_path / "folder", quantization_config=quantization)
    message = rf"quantization_config of '{quantization['quant_method']}' in config.json: they are quantized; give the"
    with pytest.raises(UserError, match=message):
        layout_of(folder, family)


def test_a_head_that_is_tied_to_the_embedding(tmp_path: Path) -> None:
    """Saved or not, the head is the embedding, as in transformers."""
    from safetensors.torch import load_file, save_file

    head = "language_model.lm_head.weight"
    for saved in (True, False):
        folder = edited("openvla", tmp_path / str(saved), section="text_config", tie_word_embeddings=True)
        tensors = load_file(folder / "model.safetensors")
        tensors = tensors if saved else {name: tensor for name, tensor in tensors.items() if name != head}
        save_file(tensors, folder / "model.safetensors")
        layout = layout_of(folder, "openvla")
        assert layout.origins["head.weight"].names == ("language_model.model.embed_tokens.weight",)
        assert (head in layout.unused) == saved
