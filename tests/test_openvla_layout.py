"""What the readers of OpenVLA's and OpenVLA-OFT's folders find out, what they must be told, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlrc.compressor.checkpoints import reader
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.errors import UserError
from rlrc.runtime.inference import preprocess

DATA = Path(__file__).parent / "data"
TOKENIZER = DATA / "openvla" / "checkpoint" / "tokenizer.json"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """``copied(name, **config)``: a copy of a golden's checkpoint with changes of config.json (None: removed)."""

    def copy(name: str, **config: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(DATA / name / "checkpoint", folder)
        changed = {**json.loads((folder / "config.json").read_text()), **config}
        values = {key: value for key, value in changed.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return copy


def hints(name: str, *without: str, **extra: Any) -> dict[str, Any]:
    known = read_hints(DATA / name / "golden.json")
    return {key: value for key, value in known.items() if key not in without} | extra


def layout_of(folder: Path, given: dict[str, Any], **options: Any) -> Layout:
    opened = open_folder(folder)
    wanted = ReadOptions(given, **options)
    layout: Layout = reader.layout(opened, wanted)
    reader.check(opened, layout, reader.build(layout))
    return layout


SAID = ("oft", "robot", "num_actions_chunk", "action_dim", "proprio_dim", "normalization", "head", "pt_key_prefix")


def test_chunk_and_bounds_by_the_data_sets_name(copied: Callable[..., Path]) -> None:
    """Nothing is said but heads and pictures: LIBERO's is 8 steps, ALOHA's 25 with the least and largest values."""
    folder = copied("openvla-oft-l1")
    layout = layout_of(folder, hints("openvla-oft-l1", *SAID))
    assert layout.spec.action.horizon == 8
    stats = json.loads((folder / "dataset_statistics.json").read_text())["libero_spatial_no_noops"]
    low, high = stats["action"]["q01"][0], stats["action"]["q99"][0]
    norm = layout.spec.action.norm
    assert norm.center[0] - norm.scale[0] == pytest.approx(low, abs=1e-12)
    assert norm.center[0] + norm.scale[0] == pytest.approx(high + 1e-8, abs=1e-12)
    assert (norm.center[6], norm.scale[6]) == (0, 1)  # masked
    (folder / "dataset_statistics.json").write_text(json.dumps({"aloha_fold": stats}))
    layout = layout_of(folder, hints("openvla-oft-l1", *SAID))
    assert layout.spec.action.horizon == 25
    assert layout.spec.state is not None
    norm = layout.spec.state.norm
    assert norm.center[0] - norm.scale[0] == pytest.approx(stats["proprio"]["min"][0], abs=1e-12)
    assert norm.clip == 1


def fine_tuned(folder: Path, felt: bool) -> None:
    """dataset_statistics.json as both official codes save it: OpenVLA's has zeros for a state that it did not load."""
    (stats,) = json.loads((folder / "config.json").read_text())["norm_stats"].values()
    if not felt:
        stats["proprio"] = {name: [0.0] * len(values) for name, values in stats["proprio"].items()}
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero_goal": stats}))


PLACES = ("openvla-oft/runs/plain", "openvla-7b-oft-finetuned-libero", "aloha/openvla-v01-7b", "anything")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("saved", ["published", "fine-tuned", "with a state of the action's length"])
def test_no_folders_name_makes_an_openvla_another_policy(tmp_path: Path, place: str, saved: str) -> None:
    folder = shutil.copytree(DATA / "openvla/checkpoint", tmp_path / place)
    if saved != "published":
        fine_tuned(folder, felt=saved != "fine-tuned")
    layout = layout_of(folder, hints("openvla"))
    assert (layout.spec.family, layout.spec.action.horizon) == ("openvla", 1)
    assert layout.spec.prompt is not None
    assert layout.spec.prompt.template.startswith("In: ")
    assert ["--hints family" in line for line in layout.assumed] == [True] * (saved != "published")


@pytest.mark.parametrize("place", PLACES)
def test_no_folders_name_tells_the_length_of_a_chunk(tmp_path: Path, place: str) -> None:
    folder = shutil.copytree(DATA / "openvla-oft-l1/checkpoint", tmp_path / place)
    layout = layout_of(folder, hints("openvla-oft-l1", *SAID))
    assert layout.spec.action.horizon == 8
    assert [line.split(" (")[0] for line in layout.assumed] == [
        "chunks of 8 actions, by the name of its data set, 'libero_spatial_no_noops'",
        "normalisation by bounds_q99, by the name of its data set, 'libero_spatial_no_noops'",
    ]
    statistics = folder / "dataset_statistics.json"
    for name in ("kitchen", "cambridge", "libero_to_aloha"):  # no robot, none as a word, two
        statistics.write_text(json.dumps({name: next(iter(json.loads(statistics.read_text()).values()))}))
        with pytest.raises(UserError, match="give num_actions_chunk"):
            layout_of(folder, hints("openvla-oft-l1", *SAID))


@pytest.mark.parametrize(
    ("added", "family"),
    [
        ({"num_actions_chunk": 3, "head": "discrete"}, "openvla-oft"),
        ({"num_images_in_input": 2, "head": "discrete"}, "openvla-oft"),
        ({"family": "openvla-oft", "head": "discrete"}, "openvla-oft"),
        ({"family": "openvla"}, "openvla"),
    ],
)
def test_which_of_the_two_families(copied: Callable[..., Path], added: dict[str, Any], family: str) -> None:
    folder = copied("openvla-oft-discrete")
    given = hints("openvla-oft-discrete", *SAID) | ({} if family == "openvla" else {"num_actions_chunk": 5}) | added
    assert layout_of(folder, given).spec.family == family


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({}, r"expected action_head--\*.pt in .*found none; .*\"head\": \"discrete\".*--hints"),
        ({"num_actions_chunk": 8}, r"expected action_head--\*.pt in .*found none; .*discrete"),
        ({"num_images_in_input": 2}, r"expected action_head--\*.pt in .*found none; .*discrete"),
        ({"family": "openvla-oft"}, r"expected action_head--\*.pt in .*found none; .*discrete"),
        ({"family": "openvla", "num_actions_chunk": 8}, r"as the hint family says openvla, found num_actions_chunk"),
        ({"family": "pi0"}, r"hint family to be one of openvla, openvla-oft, found 'pi0'"),
        ({"head": "diffusion"}, r"hint head to be one of l1, discrete, found 'diffusion'"),
        ({"head": "discrete", "robot": "panda", "num_images_in_input": 1}, r"robot to be one of libero.*found 'panda'"),
        ({"head": "discrete", "normalization": ["bounds"], "num_images_in_input": 1}, r"chunk's length .*\['bounds'\]"),
    ],
)
@pytest.mark.parametrize("left", ["no files", "the projector"])
def test_without_its_head_an_oft_is_no_policy_of_tokens(
    copied: Callable[..., Path], added: dict[str, Any], message: str, left: str
) -> None:
    """The weights of both kinds are alike: decoded as tokens, those of an L1 policy give any action."""
    folder = copied("openvla-oft-l1")
    for path in folder.glob("action_head*" if left == "the projector" else "*.pt"):
        path.unlink()
    given = {**hints("openvla-oft-l1", *SAID, "use_proprio", "num_images_in_input"), **added}
    with pytest.raises(UserError, match=message.replace("found num", "found .*num")) as caught:
        layout_of(folder, given)
    assert "\n" not in str(caught.value)


def test_a_state_that_is_left_out_is_said(copied: Callable[..., Path]) -> None:
    """Whether an L1 policy takes a state is known by its projector alone, which may have been forgotten."""
    folder = copied("openvla-oft-l1")
    assert not [line for line in layout_of(folder, hints("openvla-oft-l1")).assumed if "state" in line]
    next(folder.glob("proprio_projector--*.pt")).unlink()
    layout = layout_of(folder, hints("openvla-oft-l1", "use_proprio"))
    assert layout.spec.state is None
    assert "no state, because there is no proprio_projector--*.pt (--hints use_proprio)" in layout.assumed
    assert not layout_of(folder, hints("openvla-oft-l1", use_proprio=False)).assumed


def test_heads_of_one_step(copied: Callable[..., Path]) -> None:
    folder = copied("openvla-oft-l1")
    projector = folder / "proprio_projector--111_checkpoint.pt"
    other = projector.rename(folder / "proprio_projector--222_checkpoint.pt")
    message = r"one training step in .*, found action_head--111_checkpoint.pt and proprio_projector--222_checkpoint.pt"
    with pytest.raises(UserError, match=message):
        layout_of(folder, hints("openvla-oft-l1"))
    other.rename(folder / "proprio_projector--latest_checkpoint.pt")
    with pytest.raises(UserError, match="one training step"):
        layout_of(folder, hints("openvla-oft-l1"))
    (folder / "action_head--111_checkpoint.pt").rename(folder / "action_head--latest_checkpoint.pt")
    layout_of(folder, hints("openvla-oft-l1"))


def test_pictures_are_told_by_the_option_first(copied: Callable[..., Path]) -> None:
    layout = layout_of(copied("openvla-oft-l1"), hints("openvla-oft-l1"), images=3)
    assert [camera.name for camera in layout.spec.cameras] == ["image0", "image1", "image2"]


@pytest.mark.parametrize("where", ["config", "file"])
def test_statistics_of_several_data_sets(copied: Callable[..., Path], where: str) -> None:
    """A dataset_statistics.json takes the place of norm_stats."""
    folder = copied("openvla")
    (stats,) = json.loads((folder / "config.json").read_text())["norm_stats"].values()
    other = {"action": {**stats["action"], "q01": [-2.0] * 7, "q99": [4.0] * 6 + [-2.0], "mask": None}}
    several = {"bridge_orig": stats, "other": other}
    if where == "file":
        (folder / "dataset_statistics.json").write_text(json.dumps(several))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "norm_stats": several}))
    norm = layout_of(folder, hints("openvla"), unnorm_key="other").spec.action.norm
    assert norm.center[:6] == (1.0,) * 6
    assert norm.scale[:6] == (3.0,) * 6
    assert norm.center[6] == pytest.approx(-2, abs=1e-8)  # a range of no width stays where it is
    for key, message in ((None, "found bridge_orig, other; .*--unnorm-key"), ("kuka", "bridge_orig, other .*'kuka'")):
        with pytest.raises(UserError, match=message):
            layout_of(folder, hints("openvla"), unnorm_key=key)


@pytest.mark.parametrize(
    ("backbone", "added"), [("vicuna-v15-7b", {}), ("vicuna-v15-13b", {}), ("llama2-7b-pure", {"prompt": "vicuna"})]
)
def test_first_version_has_vicunas_prompt(copied: Callable[..., Path], backbone: str, added: dict[str, Any]) -> None:
    """Which is that of its language model, whatever the folder is called."""
    prompt = layout_of(copied("openvla", llm_backbone_id=backbone), hints("openvla", **added)).spec.prompt
    assert prompt is not None
    assert prompt.template == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: What action should the robot take to "
        "{instruction}? ASSISTANT:"
    )
    tokenizer = preprocess.Tokenizer(TOKENIZER, prompt)
    assert tokenizer("Close The Drawer").tolist() == tokenizer("close the drawer").tolist()
    assert tokenizer("close the drawer")[-1] == 29871


def test_a_prompt_that_the_language_model_does_not_tell(copied: Callable[..., Path]) -> None:
    folder = copied("openvla", llm_backbone_id=None)
    layout = layout_of(folder, hints("openvla"))
    assert layout.spec.prompt is not None
    assert layout.spec.prompt.template.startswith("In: ")
    assert [line for line in layout.assumed if "--hints prompt" in line]
    config = json.loads((folder / "config.json").read_text())
    for backbone, added in (("llama2-7b-chat", {}), ("llama2-7b-pure", {"prompt": "chat"})):
        (folder / "config.json").write_text(json.dumps({**config, "llm_backbone_id": backbone}))
        with pytest.raises(UserError, match=r"a prompt of pure or vicuna .* found '.*chat'; .*--hints"):
            layout_of(folder, hints("openvla", **added))


TEXT = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 44, "num_attention_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 32064}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "given", "message"),
    [
        ("openvla", {}, {}, r"divides the 24 channels of dinov2 .* found none .*'dinosiglip-vit-test'.*--hints"),
        ("openvla", {}, {"dinov2": {"heads": 5}}, "divides the 24 channels of dinov2 .* found 5"),
        ("openvla", {"text_config": {**TEXT, "num_hidden_layers": 4}}, None, "expected 4 layers .* found 3"),
        ("openvla", {"text_config": {**TEXT, "hidden_size": 18}}, None, r"\(32064, 18\).*embed_tokens.*\(32064, 16\)"),
        ("openvla", {"text_config": {**TEXT, "num_key_value_heads": 1}}, None, r"\(8, 16\) for .*k_proj.*\(16, 16\)"),
        ("openvla", {"text_config": {**TEXT, "num_attention_heads": 3}}, None, "found 16, 3 and 3"),
        ("openvla", {"text_config": {**TEXT, "vocab_size": "many"}}, None, "whole number as vocab_size .* 'many'"),
        ("openvla", {"text_config": "llama"}, None, "an object as text_config"),
        ("openvla", {"text_config": {**TEXT, "model_type": "phi"}}, None, "expected a Llama .* 'phi'"),
        ("openvla", {"text_config": {**TEXT, "rope_scaling": {"type": "linear"}}}, None, "without rope_scaling"),
        ("openvla", {"use_fused_vision_backbone": False}, None, "expected use_fused_vision_backbone true"),
        ("openvla", {"image_sizes": [70, 70]}, None, r"\(1, 25, 24\) .*pos_embed.* \(1, 16, 24\)"),
        ("openvla", {"image_sizes": [56, 70]}, None, "expected one size in pixels"),
        ("openvla", {"norm_stats": None}, None, "expected statistics of a data set"),
        ("openvla", {"norm_stats": {"a": {"action": {"q01": [1.0]}}}}, None, r"q01 and q99 of action.* found \[1.0\]"),
        ("openvla", {"norm_stats": {"a": {"action": {"q01": [0], "q99": [1, 2]}}}}, None, "q01 and q99 of action"),
        ("openvla", {"norm_stats": {"a": {"action": {"q01": [2], "q99": [1]}}}}, None, "q01 and q99 of action"),
        ("openvla", {"norm_stats": {"a": {"action": {"q01": 1, "q99": "x"}}}}, None, "q01 and q99 of action"),
        ("openvla", {"norm_stats": {"a": {"action": {"q01": [False], "q99": [True]}}}}, None, r"q01 .* \[\] and"),
        ("openvla", {"norm_stats": {"a": {"action": {"q01": [1], "q99": [2], "mask": ["no"]}}}}, None, "mask of"),
        ("openvla", {"text_config": {**TEXT, "rope_theta": True}}, None, "rope_theta of .* 1e-06 and True"),
        ("openvla", {"text_config": {**TEXT, "num_hidden_layers": True}}, None, "as num_hidden_layers .* found True"),
        ("openvla", {"llm_max_length": 20}, None, "llm_max_length of more than the 23 tokens outside the prompt"),
        ("openvla-oft-l1", {"llm_max_length": 90}, None, "llm_max_length of more than the 90 tokens .* found 90"),
        ("openvla", {"norm_stats": {"a": 3}}, None, "an object as statistics of 'a'"),
        ("openvla", {"text_config": {**TEXT, "rms_norm_eps": "1e-5"}}, None, "positive numbers as rms_norm_eps"),
        ("openvla-oft-l1", {}, ("num_images_in_input",), "number of pictures .*weights do not say.*--images"),
        ("openvla-oft-discrete", {}, {"head": "l1"}, r"action_head--\*.pt .* as the hints say"),
        ("openvla-oft-discrete", {}, {"use_proprio": True}, r"proprio_projector--\*.pt .* as the hints say"),
        ("openvla-oft-l1", {}, {"num_actions_chunk": 0}, "chunk's length .* found none"),
        ("openvla-oft-l1", {}, {"normalization": "normal"}, "normalization .bounds_q99 or bounds."),
    ],
)  # fmt: skip
def test_refused(copied: Callable[..., Path], name: str, config: dict[str, Any], given: Any, message: str) -> None:
    """``given``: hints, which replace the golden's if empty; the names of those that are not given."""
    said = {} if given == {} else hints(name, *given) if isinstance(given, tuple) else hints(name, **(given or {}))
    with pytest.raises(UserError, match=message) as caught:
        layout_of(copied(name, **config), said)
    assert "\n" not in str(caught.value)


def test_other_vision_backbones_are_refused(copied: Callable[..., Path]) -> None:
    """CLIP's and ImageNet's have a class token with a position, and no registers."""
    folder = copied("openvla", vision_backbone_id="dinoclip-vit-l-336px")
    weights = load_file(folder / "model.safetensors")
    del weights["vision_backbone.featurizer.reg_token"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"class token and no registers .*'dinoclip-vit-l-336px'.*does not support"):
        layout_of(folder, hints("openvla"))


def test_refused_by_its_files(copied: Callable[..., Path]) -> None:
    folder, given = copied("openvla-oft-l1"), hints("openvla-oft-l1")
    head = folder / "action_head--111_checkpoint.pt"
    weights = torch.load(head, weights_only=True)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            layout_of(folder, given)

    stats = json.loads((folder / "dataset_statistics.json").read_text())
    (only,) = stats.values()
    (folder / "dataset_statistics.json").write_text(json.dumps({"kitchen": only}))
    with pytest.raises(UserError, match=r"chunk's length .* 'kitchen' do not say.*num_actions_chunk"):
        layout_of(folder, hints("openvla-oft-l1", *SAID))
    torch.save({**weights, "model.fc2.weight": torch.zeros(5, 16)}, head)
    refused(r"\(7, 16\) for tensor model.fc2.weight, found \(5, 16\)")
    torch.save({f"noise_predictor.mlp_resnet.{name}": value for name, value in weights.items()}, head)
    refused("found a diffusion head")
    torch.save(weights, head)
    film = folder / "vision_backbone--111_checkpoint.pt"
    torch.save({"scale": torch.zeros(1)}, film)
    refused("found FiLM")
    film.unlink()
    torch.save({"fc1.weight": torch.zeros(1)}, folder / "noisy_action_projector--111_checkpoint.pt")
    refused("found a diffusion head")


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("preprocessor_config.json", "image_resize_strategy", "letterbox", "resize-naive.*'letterbox'"),
        ("preprocessor_config.json", "interpolations", ["bicubic", "bilinear"], "bilinear"),
        ("preprocessor_config.json", "means", [[0.5, 0.5, 0.5]], "three means for each of 2 vision backbones"),
        ("preprocessor_config.json", "stds", 0.5, "three stds for each of 2 vision backbones"),
    ],
)
def test_refused_by_its_processor(copied: Callable[..., Path], file: str, key: str, value: Any, message: str) -> None:
    folder = copied("openvla")
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, key: value}))
    with pytest.raises(UserError, match=message):
        layout_of(folder, hints("openvla"))


def test_pictures_are_normalised_as_the_processors_file_says(copied: Callable[..., Path]) -> None:
    """And without that file as the backbones were trained."""
    folder = copied("openvla")
    expected = layout_of(folder, hints("openvla")).spec.cameras
    values = json.loads((folder / "preprocessor_config.json").read_text())
    other = {**values, "means": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]}
    (folder / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"one set of means .*found \[\[0.1, .*\[\[0.485.* as tvf_normalize_params"):
        layout_of(folder, hints("openvla"))
    del other["tvf_normalize_params"]
    (folder / "preprocessor_config.json").write_text(json.dumps(other))
    assert layout_of(folder, hints("openvla")).spec.cameras[0].mean == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    rounded = {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]}
    derived = [rounded, values["tvf_normalize_params"][1]]  # openvla-7b's, in bfloat16: the official code takes these
    (folder / "preprocessor_config.json").write_text(json.dumps({**values, "tvf_normalize_params": derived}))
    camera = layout_of(folder, hints("openvla")).spec.cameras[0]
    assert camera.mean == (0.484375, 0.455078125, 0.40625, 0.5, 0.5, 0.5)
    assert camera.std == (0.228515625, 0.2236328125, 0.224609375, 0.5, 0.5, 0.5)
    (folder / "preprocessor_config.json").unlink()
    for one, same in zip(layout_of(folder, hints("openvla")).spec.cameras, expected, strict=True):
        assert (one.mean, one.std) == (pytest.approx(same.mean, abs=1e-7), pytest.approx(same.std, abs=1e-7))
