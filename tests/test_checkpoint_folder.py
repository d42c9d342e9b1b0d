"""Paths that are not what a command expected: what they are is said, and what to do; what is meant is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import DATA, flags
from rlrc.checkpoint_folder import Flags, is_checkpoint
from rlrc.compressor.checkpoints import hub
from rlrc.compressor.checkpoints.folder import open_folder, options_of
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.checkpoints.write_back import write_checkpoint
from rlrc.errors import UserError
from rlrc.runtime.cli import main

MODEL = "model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What lerobot-train leaves: checkpoints/STEP/{pretrained_model,training_state}, and a link to the last."""
    for step in ("002500", "005000"):
        shutil.copytree(DATA / "act/checkpoint", tmp_path / "run/checkpoints" / step / "pretrained_model")
        (tmp_path / "run/checkpoints" / step / "training_state").mkdir()
    (tmp_path / "run/checkpoints/last").symlink_to("005000")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "given",
    ["last", "005000", "last/pretrained_model", "005000/pretrained_model/model.safetensors",
     "002500/pretrained_model/config.json"],
)  # fmt: skip
def test_a_policy_in_a_training_run(run: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / given
    assert is_checkpoint(path, Flags())
    found = hub.locate(path)
    assert (found.name, (found / MODEL).is_file()) == ("pretrained_model", True)
    assert main(["inspect", str(path)]) == 0
    assert "act" in capsys.readouterr().out


def test_a_training_run_where_an_artifact_is_needed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run / "checkpoints/last")]) == 2
    message = "a step of a LeRobot training run, with a checkpoint of 'act' in its training code's format; make an"
    assert message in capsys.readouterr().err


def pi(names: list[str], folder: Path, **config: object) -> None:
    folder.mkdir()
    save_file({name: torch.zeros(1) for name in names}, folder / MODEL)
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "lerobot/smolvla_base"}')
    (folder / "config.json").write_text('{"type": "smolvla", "use_peft": true}')
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")


def files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return make


PALIGEMMA = "paligemma_with_expert.paligemma.lm_head.weight"
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter": (adapter, "a PEFT adapter of lerobot/smolvla_base .*does not support yet; merge it into its base"),
    "adapter alone": (files("adapter_config.json", "adapter_model.safetensors"), "a PEFT adapter of a base model that"),
    "adapter of OFT": (
        files("lora_adapter/adapter_config.json", "action_head--1_checkpoint.pt", "dataset_statistics.json"),
        "a PEFT adapter of .*merge_lora_weights_and_save.py",
    ),
    "openpi": (
        lambda path: pi([PALIGEMMA, "time_mlp_in.weight"], path, action_dim=32, action_horizon=10),
        "pi0.5 as openpi saves it .*does not support yet; give the same policy in lerobot's format",
    ),
    "openpi's training": (lambda path: pi([PALIGEMMA, "state_proj.weight"], path), "pi0 as openpi saves it"),
    "openpi in JAX": (files("params/_METADATA", "assets/droid/norm_stats.json"), "a JAX checkpoint of openpi"),
    "data": (files("meta/info.json", "data/x.parquet"), "a LeRobotDataset, not a policy; give it as --data"),
    "tokenizer": (files("tokenizer.json"), "a tokenizer's folder; .*--tokenizer"),
    "run": (
        files("checkpoints/0100/pretrained_model/config.json", "checkpoints/0200/pretrained_model/config.json"),
        "LeRobot training run with the checkpoints 0100, 0200; give one, such as .*checkpoints/0200",
    ),
    "checkpoints": (files("0100/pretrained_model/config.json"), "the checkpoints 0100; give one"),
    "prismatic": (files("checkpoints/step-1.pt", "config.yaml"), "convert_openvla_weights_to_hf.py"),
    "interrupted": (
        files("stage.json", "state.pt"),
        "the saved state of an interrupted stage; run that stage's command again",
    ),
    "graphs": (files("decoder.onnx"), "graphs without an artifact's manifest.json"),
    "pickled": (files("config.json", "pytorch_model.bin"), "neither type nor model_type with pickled weights"),
    "of no family": (lambda path: pi(["a"], path, width=3), "has neither type nor model_type; is it a policy's folder"),
    "no weights": (files("config.json"), "without weights; copy model.safetensors"),
    "no configuration": (lambda path: pi(["a"], path), "without config.json; copy config.json from where"),
    "nothing": (lambda path: path.mkdir(), "an empty folder; check the path"),
    "something": (files("a.txt", "b/c"), "a folder with a.txt, b; give an artifact, or a policy's folder"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_a_folder_is_instead(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = FOREIGN[kind]
    make(tmp_path / "it")
    commands = [
        ["inspect"],
        ["prune", str(tmp_path / "out"), "--lossless"],
        ["verify"],
        ["export", str(tmp_path / "out")],
    ]
    for command, *others in commands:
        assert main([command, str(tmp_path / "it"), *others]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "copy the folder again" not in error
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(error)
    assert not (tmp_path / "out").exists()


def test_an_official_checkpoint_where_an_artifact_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["verify"], ["export", "OUT"]):
        assert main([command[0], str(DATA / "act/checkpoint"), *command[1:]]) == 2
        assert "a checkpoint of 'act' in its training code's format; make an artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decoder.gguf", "a GGUF file; give the artifact's folder"),
        ("last.ckpt", "a pickled checkpoint, which rlrc does not open; save the weights as safetensors"),
        ("policy.zip", "an archive; unpack it"),
        ("weights.safetensors", "weights without their folder; give the folder that holds them"),
    ],
)
def test_what_a_file_is(tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).touch()
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_link_to_nothing_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last").symlink_to("010000")
    assert not is_checkpoint(Path("checkpoints/last"), Flags())
    with pytest.raises(UserError, match="a link to 010000, which is missing"):
        open_folder(hub.locate("checkpoints/last"))


def test_weights_that_git_has_not_fetched(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "act/checkpoint", tmp_path / "folder")
    (folder / MODEL).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="a Git LFS pointer to it; run git lfs pull there"):
        open_folder(folder)


def test_policies_that_are_near_in_name_only(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "act/checkpoint", tmp_path / "folder")
    for kind in ("pi0_fast", "diffusion", "gr00t_n1_5", "llama"):
        (folder / "config.json").write_text(json.dumps({"type": kind}))
        with pytest.raises(UserError, match=rf"found '{kind}' in .*; rlrc does not support that policy"):
            read(open_folder(folder))


WRAPPED = ("module.", "_orig_mod.", "module._orig_mod.", "model.", "base_model.", "base_model.model.", "policy.")


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("act", prefix) for prefix in WRAPPED]
    + [(family, prefix) for family in ("openvla-oft-l1", "pi0", "smolvla") for prefix in ("module.", "model.")]
    + [("openvla", "base_model.model."), ("pi05", "policy._orig_mod.")],
)
def test_what_stands_before_every_name(tmp_path: Path, family: str, prefix: str) -> None:
    """Wrappers of training code: the weights are the same, and are written back by the names of the file."""
    folder = shutil.copytree(DATA / family / "checkpoint", tmp_path / "folder")
    tensors = load_file(folder / MODEL)
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, folder / MODEL)
    options = options_of(flags(family))
    policy, _ = read(open_folder(folder), options)
    expected, _ = read(open_folder(DATA / family / "checkpoint"), options)
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    write_checkpoint(policy, open_folder(folder), tmp_path / "back", options)
    back = load_file(tmp_path / "back" / MODEL)
    assert back.keys() == {f"{prefix}{name}" for name in tensors}
    assert all(torch.equal(back[f"{prefix}{name}"], tensor) for name, tensor in tensors.items())


def test_names_of_a_model_that_was_compiled_inside(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "act/checkpoint", tmp_path / "folder")
    tensors = load_file(folder / MODEL)
    save_file({name.replace("model.", "model._orig_mod.", 1): t for name, t in tensors.items()}, folder / MODEL)
    read(open_folder(folder))
    inner = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(inner, folder / MODEL)
    read(open_folder(folder))
    save_file({**tensors, "module.model.action_head.bias": torch.zeros(6)}, folder / MODEL)
    with pytest.raises(UserError, match=r"expected one tensor model\.action_head\.bias in"):
        open_folder(folder)


def test_an_adapter_among_the_weights(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "act/checkpoint", tmp_path / "folder")
    tensors = load_file(folder / MODEL)
    lora = {"base_model.model.model.action_head.lora_A.default.weight": torch.zeros(2, 32)}
    save_file({**tensors, **lora}, folder / MODEL)
    with pytest.raises(UserError, match=r"expected merged weights .*lora_A.*merge_and_unload\(\)"):
        open_folder(folder)


TOWER = "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model"
SAVED: dict[str, dict[str, Tensor]] = {
    "openvla": {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "language_model.model.rotary_emb.inv_freq": torch.ones(4),
    },
    "openvla-oft-l1": {"language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    "pi0": {
        "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.position_ids": torch.arange(
            16
        )[None],
        "model.paligemma_with_expert.gemma_expert.model.rotary_emb.inv_freq": torch.ones(4),
    },
    "smolvla": {
        "model.vlm_with_expert.vlm.model.vision_model.embeddings.position_ids": torch.arange(16)[None],
        "model.vlm_with_expert.lm_expert.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    },
    "act": {"model.encoder.position_ids": torch.arange(4)},
}


@pytest.mark.parametrize("family", SAVED)
def test_buffers_that_follow_from_the_configuration(tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(DATA / family / "checkpoint", tmp_path / "folder")
    save_file(load_file(folder / MODEL) | SAVED[family], folder / MODEL)
    _, layout = read(open_folder(folder), options_of(flags(family)))
    assert SAVED[family].keys() <= set(layout.unused)


@pytest.mark.parametrize("where", ["dataset_statistics.json", "config.json"])
def test_statistics_without_the_data_sets_level(tmp_path: Path, where: str) -> None:
    folder = shutil.copytree(DATA / "openvla-oft-l1/checkpoint", tmp_path / "folder")
    (stats,) = json.loads((folder / "dataset_statistics.json").read_text()).values()
    if where == "config.json":
        (folder / "dataset_statistics.json").unlink()
        config = json.loads((folder / where).read_text())
        (folder / where).write_text(json.dumps({**config, "norm_stats": stats}))
    else:
        (folder / where).write_text(json.dumps(stats))
    options = options_of(Flags(hints=DATA / "openvla-oft-l1/golden.json", images=2))
    _, layout = read(open_folder(folder), options)
    _, expected = read(open_folder(DATA / "openvla-oft-l1/checkpoint"), options)
    assert layout.spec.action.norm == expected.spec.action.norm
    with pytest.raises(UserError, match=r"found 'bridge'"):
        read(open_folder(folder), options_of(Flags(hints=DATA / "openvla-oft-l1/golden.json", unnorm_key="bridge")))
