"""Opening official folders: what is read, what is refused, and that nothing of them is run."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrc.compressor.checkpoints import reader
from rlrc.compressor.checkpoints.folder import Folder, ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.lerobot import act
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.checkpoints.tensors import of_model, of_pt
from rlrc.compressor.models.nn.linear import Embedding, Linear, widen
from rlrc.compressor.models.policy import PolicyModule
from rlrc.errors import UserError

DATA = Path(__file__).parent / "data"
FAMILIES = ("act", "openvla", "openvla-oft-discrete", "openvla-oft-l1", "pi0", "pi05", "smolvla")
MODEL, CONFIG = "model.safetensors", "config.json"


def options(family: str, **others: Any) -> ReadOptions:
    return ReadOptions(read_hints(DATA / family / "golden.json"), **others)


def opened(family: str) -> tuple[PolicyModule, Folder]:
    folder = open_folder(DATA / family / "checkpoint")
    return read(folder, options(family))[0], folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        return shutil.copytree(DATA / family / "checkpoint", tmp_path / family)

    return make


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / MODEL)
    change(tensors)
    save_file(tensors, folder / MODEL)


def shard(folder: Path, count: int) -> dict[str, str]:
    """Puts the weights into several files, as large checkpoints are; returns which tensor is where."""
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    index = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::count]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{MODEL}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def same(first: PolicyModule, second: PolicyModule) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_folder_is_used_or_known_as_unused(family: str) -> None:
    folder = open_folder(DATA / family / "checkpoint")
    policy, layout = read(folder, options(family))
    used = {name for origin in layout.origins.values() if not origin.file for name in origin.names}
    assert used | set(layout.unused) == set(folder.tensors)
    assert not used & set(layout.unused)
    state = policy.state_dict()
    assert {tensor.dtype for tensor in state.values()} <= {torch.float32, torch.bfloat16}
    assert not any(tensor.is_meta for tensor in (*state.values(), *policy.buffers()))
    assert not policy.training


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_stay_as_stored(mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and embeddings in bfloat16, all else in float32."""
    if mapped:
        monkeypatch.setattr(reader, "MAPPED", 0)
    folder = open_folder(DATA / "pi0/checkpoint")
    stored, layout = read(folder, options("pi0"))
    wide = widen(read(folder, options("pi0"))[0])
    truth = load_file(folder.path / MODEL)
    for name, tensor in stored.state_dict().items():
        origin = layout.origins[name]
        kept = isinstance(stored.get_submodule(name.rpartition(".")[0]), Linear | Embedding) and ".weight" in name
        assert tensor.dtype == (torch.bfloat16 if kept else torch.float32)
        if origin.convert == "same":
            assert torch.equal(tensor, truth[origin.names[0]].to(tensor.dtype))
        assert torch.equal(wide.state_dict()[name], tensor.float())
    assert all(tensor.dtype == torch.float32 for tensor in wide.state_dict().values())


def test_what_was_read_does_not_change_with_the_file(copy: Callable[[str], Path]) -> None:
    """A small policy is a copy, not a view of the mapped file: a new download must not reach here."""
    folder = copy("act")
    policy, _ = read(open_folder(folder))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    (folder / MODEL).write_bytes(b"\0" * (folder / MODEL).stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_shards(copy: Callable[[str], Path]) -> None:
    folder = copy("smolvla")
    shard(folder, 3)
    policy, _ = read(open_folder(folder), options("smolvla"))
    assert same(policy, opened("smolvla")[0])


def test_a_missing_shard(copy: Callable[[str], Path]) -> None:
    folder = copy("smolvla")
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"expected the shard model-00002-of-00003.safetensors \(2 of 3\) in .*, found none"
    ):
        open_folder(folder)


def test_a_tensor_that_is_in_no_shard(copy: Callable[[str], Path]) -> None:
    folder = copy("smolvla")
    index = shard(folder, 2)
    path = folder / index["model.state_proj.bias"]
    tensors = load_file(path)
    del tensors["model.state_proj.bias"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"expected the tensor model.state_proj.bias in the shard {path.name}"):
        open_folder(folder)


@pytest.mark.parametrize(
    "index", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../a"}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index(copy: Callable[[str], Path], index: str) -> None:
    folder = copy("act")
    (folder / MODEL).unlink()
    (folder / f"{MODEL}.index.json").write_text(index)
    with pytest.raises(UserError, match="expected a weight_map in"):
        open_folder(folder)


def test_damaged_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("act")
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"expected safetensors in .*{MODEL}, found: "):
        open_folder(folder)
    (folder / MODEL).unlink()
    with pytest.raises(UserError, match=rf"expected {MODEL} or {MODEL}.index.json in .*, found neither"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "expected JSON in"),
        ("[]", "expected an object in"),
        ("[" * 99999, "expected JSON"),
    ],
)
def test_config_that_is_missing_or_broken(copy: Callable[[str], Path], text: str | None, message: str) -> None:
    folder = copy("act")
    (folder / CONFIG).unlink() if text is None else (folder / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message):
        open_folder(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a checkpoint's folder at .*, found nothing"):
        open_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "smol_vla"}, "found 'smol_vla' in .*; the nearest is smolvla$"),
        ({"model_type": "OpenVLA2"}, "found 'OpenVLA2' in .*; the nearest is openvla$"),
        ({"type": ["pi0"]}, "found .*; the nearest is pi0$"),
        ({}, "found .* has neither type nor model_type; is it a policy's folder"),
    ],
)
def test_an_unknown_family(copy: Callable[[str], Path], config: dict[str, Any], message: str) -> None:
    folder = copy("act")
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=f"one of the families openvla, openvla-oft, pi0, pi05, smolvla, act, {message}"
    ):
        read(open_folder(folder))


def narrower(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.layers.1.mlp.up_proj.weight"] = torch.zeros(43, 16)


def without(tensors: dict[str, Tensor]) -> None:
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]


def more(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.layers.0.mlp.up_proj.bias"] = torch.zeros(44)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            narrower,
            r"expected \(44, 16\) for tensor language_model.model.layers.1.mlp.up_proj.weight, found \(43, 16\)",
        ),
        (without, "expected the tensor language_model.model.layers.1.mlp.up_proj.weight in .*, found none of 138"),
        (more, r"fits the weights of .*, found 1 tensors more than openvla has, such as \S+layers.0.mlp.up_proj.bias"),
    ],
)
def test_tensors_that_do_not_fit(copy: Callable[[str], Path], change: Callable[..., None], message: str) -> None:
    folder = copy("openvla")
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        read(open_folder(folder), options("openvla"))


def test_joined_tensors_that_do_not_fit(copy: Callable[[str], Path]) -> None:
    """Three official tensors become one: the message names all of them, with what was found."""
    folder = copy("pi0")
    prefix = "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0.self_attn."
    rewrite(folder, lambda tensors: tensors.update({f"{prefix}k_proj.weight": torch.zeros(24, 23)}))
    with pytest.raises(UserError, match=r"tensors? .*k_proj.weight.*found .*\(24, 23\)"):
        read(open_folder(folder), options("pi0"))


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("openvla", {"text_config": {"vocab_size": 32064, "hidden_size": 16, "num_hidden_layers": 2}}),
        ("openvla", {"use_fused_vision_backbone": False}),
        ("smolvla", {"num_vlm_layers": 3}),
        ("smolvla", {"max_state_dim": 31}),
        ("pi0", {"max_action_dim": 16}),
        ("act", {"dim_model": 64}),
        ("act", {"n_encoder_layers": 1}),
        ("act", {"chunk_size": 9}),
    ],
)
def test_a_config_that_contradicts_the_weights(
    copy: Callable[[str], Path], family: str, values: dict[str, Any]
) -> None:
    folder = copy(family)
    edit(folder / CONFIG, **values)
    with pytest.raises(UserError) as caught:
        read(open_folder(folder), options(family))
    message = str(caught.value)
    assert message.startswith("expected ")
    assert "found " in message
    assert "\n" not in message


PT = "action_head--111_checkpoint.pt"


class Runs:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"model.fc1.weight": 3}, "int at 'model.fc1.weight'"),
        ({"state": {"model.fc1.weight": torch.zeros(2)}}, "dict at 'state'"),
        ({3: torch.zeros(2)}, "Tensor at 3"),
        ([torch.zeros(2)], "found list"),
        (torch.nn.Linear(2, 2), "an object of torch.nn.modules.linear.Linear; save"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_with_anything_but_tensors(copy: Callable[[str], Path], content: Any, found: str, zipped: bool) -> None:
    folder = copy("openvla-oft-l1")
    torch.save(content, folder / PT, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"expected .*tensors.* in .*{PT}, .*{found}") as caught:
        read(open_folder(folder), options("openvla-oft-l1"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_that_would_run_code(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.zeros(2), "b": Runs(tmp_path / "ran")}, tmp_path / PT, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="expected nothing but tensors"):
        of_pt(tmp_path / PT)
    (tmp_path / PT).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(UserError, match="expected nothing but tensors"):
        of_pt(tmp_path / PT)
    (tmp_path / PT).write_bytes(b"")
    with pytest.raises(UserError, match="expected nothing but tensors"):
        of_pt(tmp_path / PT)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_prefix_of_distributed_training(copy: Callable[[str], Path], zipped: bool) -> None:
    folder = copy("openvla-oft-l1")
    for path in folder.glob("*.pt"):
        tensors = torch.load(path, weights_only=True)
        prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
        torch.save(prefixed, path, _use_new_zipfile_serialization=zipped)
    policy, _ = read(open_folder(folder), options("openvla-oft-l1"))
    assert same(policy, opened("openvla-oft-l1")[0])


def test_heads_of_two_steps(copy: Callable[[str], Path]) -> None:
    folder = copy("openvla-oft-l1")
    shutil.copy(folder / PT, folder / "action_head--222_checkpoint.pt")
    with pytest.raises(UserError, match=r"expected one file action_head--.*111.*222"):
        read(open_folder(folder), options("openvla-oft-l1"))


def test_statistics_of_several_data_sets(copy: Callable[[str], Path]) -> None:
    folder = copy("openvla")
    config = json.loads((folder / CONFIG).read_text())
    (stats,) = config["norm_stats"].values()
    edit(folder / CONFIG, norm_stats={"kitchen": stats, "bridge_orig": stats})
    with pytest.raises(UserError, match="found bridge_orig, kitchen; choose one with --unnorm-key"):
        read(open_folder(folder), options("openvla"))
    with pytest.raises(UserError, match=r"expected one of the data sets bridge_orig, kitchen .*, found 'bridge'"):
        read(open_folder(folder), options("openvla", unnorm_key="bridge"))
    read(open_folder(folder), options("openvla", unnorm_key="kitchen"))


def test_hints_are_sections_of_a_file_or_the_whole_of_it(tmp_path: Path) -> None:
    hints = tmp_path / "hints.json"
    hints.write_text('{"dinov2": {"heads": 3}, "num_images_in_input": 2}')
    assert read_hints(hints) == {"dinov2": {"heads": 3}, "num_images_in_input": 2}
    hints.write_text(
        '{"geometry": {"a": 1}, "loader_hints": {"b": 2}, "oft": {"c": 3}, "d": 4, "tokenizer": "t/ (it)"}'
    )
    assert read_hints(hints) == {"a": 1, "b": 2, "c": 3, "tokenizer": str(tmp_path / "t")}
    for text in ("[]", "{", '{"num_action_chunks": 8}', '{"dinov2": {"heads": 3}, "x": 1}'):
        hints.write_text(text)
        with pytest.raises(UserError, match=f"expected .* in {hints}"):
            read_hints(hints)
    hints.write_text('{"num_action_chunks": 8}')
    with pytest.raises(UserError, match=r"found num_action_chunks; did you mean num_actions_chunk\?"):
        read_hints(hints)


def test_head_counts_must_be_told_where_no_table_has_them() -> None:
    with pytest.raises(UserError, match="--hints"):
        read(open_folder(DATA / "openvla/checkpoint"))


def test_blocks_are_counted(tmp_path: Path) -> None:
    save_file({f"x.{i}.w": torch.zeros(i + 1) for i in (0, 1, 3)} | {"x.y": torch.zeros(())}, tmp_path / MODEL)
    tensors = of_model(tmp_path)
    assert (len(tensors), tensors.shape("x.y"), tensors.dtype("x.y")) == (4, (), torch.float32)
    assert tensors.depth("y.") == 0
    with pytest.raises(UserError, match=r"expected the blocks x.0 to 3 in .*, found no x.2"):
        tensors.depth("x.")
    with pytest.raises(UserError, match=r"expected \(3,\) for tensor x.1.w, found \(2,\)"):
        tensors.expect("x.1.w", (3,))
    with pytest.raises(UserError, match=r"expected the tensor x.4.w in .*, found none of 4 \(the nearest is x"):
        tensors.read("x.4.w")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_executed_unpickled_or_downloaded(
    copy: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder holds code as OpenVLA's do, and names it in config.json; the network and pickle are traps."""
    folder = copy(family)
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
    for name in ("modeling_prismatic.py", "configuration_prismatic.py", "processing_prismatic.py", "__init__.py"):
        (folder / name).write_text(code)
    edit(folder / CONFIG, auto_map={"AutoConfig": "configuration_prismatic.OpenVLAConfig"}, trust_remote_code=True)
    trapped: list[str] = []

    def trap(name: str) -> Callable[..., Any]:
        def refuse(*arguments: Any, **keywords: Any) -> Any:
            trapped.append(f"{name}{arguments}")
            raise AssertionError(name)

        return refuse

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, trap(name))
    for name in ("Unpickler", "_Unpickler", "load", "loads"):
        monkeypatch.setattr(pickle, name, trap(name))
    opened_files: list[str] = []
    real_open = builtins.open

    def watched(file: Any, *arguments: Any, **keywords: Any) -> Any:
        opened_files.append(str(file))
        return real_open(file, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", watched)
    before = set(sys.modules)
    policy, _ = read(open_folder(folder), options(family))
    assert not trapped
    assert not (tmp_path / "ran").exists()
    assert not [name for name in opened_files if name.endswith(".py")]
    loaded = {getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before}
    assert not [file for file in loaded if file.startswith(str(folder))]
    monkeypatch.undo()
    assert same(policy, opened(family)[0])


def test_the_layout_must_name_every_tensor_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in a backbone file, not the user's: a traceback."""
    folder = open_folder(DATA / "act/checkpoint")
    layout = reader.layout(folder, ReadOptions())
    del layout.origins["head.bias"]
    monkeypatch.setattr(act, "layout", lambda *_: layout)
    with pytest.raises(RuntimeError, match=r"differ in \['head.bias'\]"):
        read(folder)
