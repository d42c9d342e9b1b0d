"""NaN and infinity are refused wherever weights, logits and statistics enter or leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import DATA, flags, official
from rlrc.artifact import create_artifact, load
from rlrc.artifact import folder as artifact_folder
from rlrc.compressor.checkpoints.folder import open_folder, options_of
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
from rlrc.compressor.checkpoints.write_back import write_checkpoint
from rlrc.compressor.models import decode
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize
from rlrc.compressor.stages import artifact_io
from rlrc.compressor.stages.prune import run_prune
from rlrc.compressor.stages.sources import OfficialSource
from rlrc.compressor.stages.stage import StageOptions
from rlrc.errors import UserError
from rlrc.runtime.cli import main
from rlrc.runtime.inference.decode import NoAction, parallel

NAN, INF = float("nan"), float("inf")
MODEL = "model.safetensors"
# One tensor that the policy reads, of every kind of family.
READ = {
    "openvla": "language_model.model.layers.1.mlp.up_proj.weight",
    "openvla-oft-discrete": "vision_backbone.fused_featurizer.blocks.0.attn.qkv.weight",
    "pi05": "model.paligemma_with_expert.gemma_expert.model.layers.0.input_layernorm.dense.bias",
    "smolvla": "model.state_proj.weight",
    "act": "model.backbone.layer1.0.bn1.running_var",
}


def broken(family: str, target: Path, name: str, value: float) -> Path:
    """A copy of the golden checkpoint with one number of this tensor changed."""
    folder = shutil.copytree(DATA / family / "checkpoint", target)
    tensors = load_file(folder / MODEL)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / MODEL)
    return folder


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("family", READ)
def test_a_folder_with_a_number_that_is_none(tmp_path: Path, family: str, value: float) -> None:
    folder = broken(family, tmp_path / "folder", READ[family], value)
    message = rf"finite numbers in the tensor {READ[family]} of .*, found (nan|inf)"
    with pytest.raises(UserError, match=message) as caught:
        read(open_folder(folder), options_of(flags(family)))
    assert "\n" not in str(caught.value)


def test_a_head_beside_the_weights(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "openvla-oft-l1/checkpoint", tmp_path / "folder")
    head = next(folder.glob("action_head--*.pt"))
    tensors = torch.load(head, weights_only=True)
    tensors["model.fc2.bias"][0] = NAN
    torch.save(tensors, head)
    with pytest.raises(UserError, match=rf"tensor model.fc2.bias of .*{head.name}, found nan"):
        read(open_folder(folder), options_of(flags("openvla-oft-l1")))


def test_what_is_never_read_may_be_anything(tmp_path: Path) -> None:
    folder = broken("pi0", tmp_path / "folder", "model.paligemma_with_expert.gemma_expert.lm_head.weight", NAN)
    read(open_folder(folder), options_of(flags("pi0")))


def test_no_stage_begins_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = broken("openvla", tmp_path / "folder", READ["openvla"], NAN)
    hints, key = DATA / "openvla/golden.json", "bridge_orig"
    assert main(["prune", str(folder), str(tmp_path / "out"), "--lossless", "--hints", str(hints)]) == 2
    assert READ["openvla"] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    observation = {"image.image0": np.zeros((56, 56, 3), np.uint8), "instruction": np.array("close the drawer")}
    np.savez(tmp_path / "obs.npz", **observation)  # type: ignore[arg-type]
    given = ["--hints", str(hints), "--unnorm-key", key, "--out", str(tmp_path / "act.npz")]
    assert main(["infer", str(folder), str(tmp_path / "obs.npz"), *given]) == 2
    assert not (tmp_path / "act.npz").exists()


def changed(family: str, change: Callable[[str, Tensor], Tensor]) -> tuple[OfficialSource, PolicyModule]:
    source, policy = official(family)
    state = {name: change(name, tensor) for name, tensor in policy.state_dict().items()}
    with torch.device("meta"):
        new = type(policy)(policy.spec, policy.towers)
    new.load_state_dict(state, assign=True)
    return source, new


def poisoned(family: str, name: str, value: float) -> tuple[OfficialSource, PolicyModule]:
    def change(one: str, tensor: Tensor) -> Tensor:
        return tensor if one != name else tensor.clone().fill_(value)

    return changed(family, change)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("act", "head.weight", NAN),
        ("openvla", "decoder.layers.0.norm1.weight", -INF),
        ("act", "head.bias", 3.4e38),  # beyond bfloat16, in which artifacts are stored
    ],
)
def test_no_artifact_is_written_with_them(tmp_path: Path, family: str, name: str, value: float) -> None:
    source, policy = poisoned(family, name, value)
    with (
        pytest.raises(UserError, match=rf"finite numbers in the tensor {name} of the new artifact"),
        create_artifact(tmp_path / "out") as draft,
    ):
        source.copy_files(draft)
        artifact_io.write_policy(draft, policy, source.observations(), ())
    assert not (tmp_path / "out").exists()


def test_no_artifact_whose_answers_are_none(tmp_path: Path) -> None:
    """Finite weights with products that are not."""
    source, policy = poisoned("openvla", "head.weight", 3e38)
    with (
        pytest.raises(UserError, match=r"finite actions of the policy, found nan or inf for 4 of 4 golden obs"),
        create_artifact(tmp_path / "out") as draft,
    ):
        source.copy_files(draft)
        artifact_io.write_policy(draft, policy, source.observations(), (), exact=True)


def rewritten(artifact: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy with other weights, and the manifest that belongs to them."""
    parent = load(artifact)
    with create_artifact(target) as draft:
        draft.inherit(parent, "golden.npz", "tokenizer")
        tensors = load_file(parent.file(artifact_folder.WEIGHTS))
        change(tensors)
        save_file(tensors, draft.file(artifact_folder.WEIGHTS))
        draft.finish(replace(parent.manifest, files={}))
    return target


def test_no_artifact_is_read_with_them(tmp_path: Path) -> None:
    dense, rounded = tmp_path / "dense", tmp_path / "rounded"
    run_prune(DATA / "act/checkpoint", dense, PruneConfig(lossless=True), StageOptions())
    bad = rewritten(dense, tmp_path / "bad", lambda tensors: tensors["head.bias"].fill_(NAN))
    with pytest.raises(UserError, match=rf"finite numbers in the tensor head.bias of {bad}, found nan"):
        artifact_io.load_policy(load(bad))
    source, policy = official("smolvla")
    with create_artifact(rounded) as draft:
        source.copy_files(draft)
        result = quantize(policy.state_dict(), QuantizeConfig(bits=8))
        artifact_io.write_policy(draft, policy, source.observations(), (), result)
    name = next(iter(result.spec.tensors))
    bad = rewritten(rounded, tmp_path / "scale", lambda tensors: tensors[f"{name}.scale"].fill_(INF))
    with pytest.raises(UserError, match=rf"finite numbers in the tensor {name} of {bad}, found (nan|inf)"):
        artifact_io.load_policy(load(bad))


def test_nothing_is_exported_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_prune(DATA / "act/checkpoint", tmp_path / "dense", PruneConfig(lossless=True), StageOptions())
    bad = rewritten(tmp_path / "dense", tmp_path / "bad", lambda tensors: tensors["query"][0].fill_(INF))
    assert main(["export", str(bad), str(tmp_path / "out")]) == 2
    assert "tensor query" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_back_that_the_type_cannot_hold(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "act/checkpoint", tmp_path / "like")
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(folder / MODEL).items()
    }
    save_file(tensors, folder / MODEL)
    _, policy = poisoned("act", "head.bias", 1e5)
    with pytest.raises(UserError, match=r"model.action_head.bias of the policy as torch.float16, found inf"):
        write_checkpoint(policy, open_folder(folder), tmp_path / "out")


def test_no_action_comes_of_logits_that_are_none() -> None:
    """In torch the action is nan; the two doors to robots refuse it."""
    _, policy = official("openvla")
    action = policy.spec.action
    assert action.tokens is not None
    logits = torch.zeros(2, action.horizon, action.dim, action.tokens.rows)
    logits[0, 0, 2, 5], logits[1, 0, 4, 7] = NAN, INF
    actions = decode.outputs_from_logits(logits, action).actions
    assert [actions[0, 0].isnan().nonzero().flatten().tolist(), actions[1, 0].isnan().nonzero().flatten().tolist()] == [
        [2],
        [4],
    ]
    with pytest.raises(UserError, match="finite logits of the policy"):
        decode.check_finite_outputs(logits, "logits")

    def run(graph: str, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"logits": logits.numpy()}

    with pytest.raises(NoAction, match="finite logits, found 2 nan or inf"):
        parallel(run, {}, action)


@pytest.mark.parametrize("family", ["openvla", "openvla-oft-discrete"])
def test_no_action_of_a_token_policy_in_torch(family: str) -> None:
    source, policy = poisoned(family, "head.weight", 3e38)
    observations = source.observations()
    observation: dict[str, Any] = {name: array[0] for name, array in observations.items() if name != "ids"}
    observation["instruction"] = str(observation.pop("instructions"))
    with pytest.raises(NoAction, match="finite actions"):
        TorchPolicy(policy.spec, source.tokenizer, lambda: policy).infer(observation)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e400", -1])
def test_settings_that_are_no_numbers(tmp_path: Path, value: Any) -> None:
    folder = shutil.copytree(DATA / "openvla/checkpoint", tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = "VALUE"
    (folder / "config.json").write_text(json.dumps(config).replace('"VALUE"', str(value)))
    with pytest.raises(UserError, match="rms_norm_eps"):
        read(open_folder(folder), options_of(flags("openvla")))


def test_weights_of_integers_are_no_floats(tmp_path: Path) -> None:
    """int8 and fp8 folders keep their scales beside the weights: taken as numbers they mean something else."""
    for i, (family, dtype) in enumerate([("openvla", torch.int8), ("act", torch.float8_e4m3fn), ("pi0", torch.uint8)]):
        folder = shutil.copytree(DATA / family / "checkpoint", tmp_path / str(i))
        tensors = load_file(folder / MODEL)
        name = next(name for name in tensors if name.endswith(("mlp.up_proj.weight", "linear1.weight")))
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, folder / MODEL)
        found = str(dtype).removeprefix("torch.")
        message = rf"floating-point numbers in the tensor {name} of .*, found {found}: .*quant"
        with pytest.raises(UserError, match=message):
            read(open_folder(folder), options_of(flags(family)))
