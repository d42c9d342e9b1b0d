"""Policies back in the official format: bit for bit the same where nothing changed, refused where the shape did."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlrc.compressor.checkpoints import folder as official
from rlrc.compressor.checkpoints import tensors as weights
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.layout import TensorOrigin
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.checkpoints.write_back import write_checkpoint
from rlrc.compressor.models.families import build
from rlrc.compressor.models.nn.linear import widen
from rlrc.errors import UserError

DATA = Path(__file__).parent / "data"
FAMILIES = ("act", "openvla", "openvla-oft-discrete", "openvla-oft-l1", "pi0", "pi05", "smolvla")


def options(family: str) -> ReadOptions:
    return ReadOptions(read_hints(DATA / family / "golden.json"))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unchanged_policy_gives_the_same_files(family: str, wide: bool, tmp_path: Path) -> None:
    folder = open_folder(DATA / family / "checkpoint")
    policy, _ = read(folder, options(family))
    if wide:
        widen(policy)
    write_checkpoint(policy, folder, tmp_path / "out", options(family))
    files = {path.name for path in folder.path.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for name in files:
        if name.endswith(".pt"):
            old, new = (torch.load(path / name, weights_only=True) for path in (folder.path, tmp_path / "out"))
            assert list(old) == list(new)
            assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)
        else:
            assert (tmp_path / "out" / name).read_bytes() == (folder.path / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_policy_is_what_is_read_again(family: str, tmp_path: Path) -> None:
    folder = open_folder(DATA / family / "checkpoint")
    policy, layout = read(folder, options(family))
    for tensor in policy.state_dict().values():
        tensor.mul_(2)  # exact in bfloat16
    write_checkpoint(policy, folder, tmp_path / "out", options(family))
    again, _ = read(open_folder(tmp_path / "out"), options(family))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in policy.state_dict().items())
    old, new = (load_file(path / "model.safetensors") for path in (folder.path, tmp_path / "out"))
    assert all(torch.equal(old[name], new[name]) for name in layout.unused)
    used = [name for origin in layout.origins.values() if not origin.file for name in origin.names]
    assert all(torch.equal(2 * old[name], new[name]) for name in used)


def test_shards_prefixes_and_other_files_stay(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "openvla-oft-l1/checkpoint", tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i in (0, 1):
        save_file({name: tensors[name] for name in names[i::2]}, folder / f"{i}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(names[i::2], f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ' + str(index).replace("'", '"') + "}")
    for path in folder.glob("*.pt"):
        old = torch.load(path, weights_only=True)
        torch.save({f"module.{name}": tensor.float() for name, tensor in old.items()}, path)
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter/notes.txt").write_text("kept")
    (folder / ".cache").mkdir()
    (folder / ".cache/lock").touch()

    opened = open_folder(folder)
    policy, _ = read(opened, options("openvla-oft-l1"))
    write_checkpoint(policy, opened, tmp_path / "out", options("openvla-oft-l1"))
    for path in folder.rglob("*"):
        written = tmp_path / "out" / path.relative_to(folder)
        if ".cache" in path.parts:
            assert not written.exists()
        elif path.suffix == ".pt":
            old, new = torch.load(path, weights_only=True), torch.load(written, weights_only=True)
            assert list(old) == list(new)
            assert all(torch.equal(old[name], new[name]) and new[name].dtype == torch.float32 for name in old)
        elif path.is_file():
            assert written.read_bytes() == path.read_bytes(), path


def test_a_head_tied_to_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "pi0/checkpoint", tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.paligemma_with_expert.paligemma."
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.language_model.embed_tokens.weight"
    save_file({**tensors, head: tensors[embedding].clone()}, folder / "model.safetensors")
    opened = open_folder(folder)
    policy, _ = read(opened, options("pi0"))
    policy.state_dict()["embedding.weight"].mul_(2)
    write_checkpoint(policy, opened, tmp_path / "out", options("pi0"))
    written = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(written[head], 2 * tensors[embedding])
    assert torch.equal(written[embedding], 2 * tensors[embedding])


def test_another_geometry_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = open_folder(DATA / "openvla/checkpoint")
    policy, _ = read(folder, options("openvla"))
    decoder = policy.towers["decoder"]
    smaller = replace(decoder, layers=(decoder.layers[0], replace(decoder.layers[1], mlp=32), decoder.layers[2]))
    pruned = build(policy.spec, {**policy.towers, "decoder": smaller})
    with pytest.raises(UserError, match=r"expected the geometry of .*, found another one in the tower decoder; "):
        write_checkpoint(pruned, folder, tmp_path / "out", options("openvla"))
    assert policy.spec.action.tokens is not None
    rows = replace(policy.spec.action.tokens, rows=256, offset=31744)
    cut = build(replace(policy.spec, action=replace(policy.spec.action, tokens=rows)), policy.towers)
    with pytest.raises(UserError, match=r"found another one in head.weight"):
        write_checkpoint(cut, folder, tmp_path / "out", options("openvla"))
    other = open_folder(DATA / "act/checkpoint")
    with pytest.raises(UserError, match=r"expected a policy of act as in .*, found one of openvla"):
        write_checkpoint(policy, other, tmp_path / "out", options("act"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="expected a new output"):
        write_checkpoint(policy, folder, tmp_path / "out", options("openvla"))


def test_conversions_by_hand() -> None:
    """The shapes differ in every dimension, so that no two could be mixed up."""
    image = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # (out, colours, rows, columns)
    converted = weights.convert(part := TensorOrigin(("w",), "patches"), [image])
    assert converted.shape == (2, 60)
    assert converted[1, (2 * 5 + 3) * 3 + 1] == image[1, 1, 2, 3]  # row 2, column 3, colour 1
    assert torch.equal(weights.restore([part], [converted], "w", [(2, 3, 4, 5)]), image)

    first, second = torch.arange(3).reshape(1, 1, 3), torch.arange(3, 9).reshape(1, 2, 3)
    flat = weights.convert(part := TensorOrigin(("c", "r"), "flat"), [first, second])
    assert flat.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert torch.equal(weights.restore([part], [flat], "r", [(1, 1, 3), (1, 2, 3)]), second)

    joined = weights.convert(part := TensorOrigin(("q", "k"), "join"), [torch.ones(4, 2), torch.zeros(2, 2)])
    assert joined[:, 0].tolist() == [1, 1, 1, 1, 0, 0]
    assert torch.equal(weights.restore([part], [joined], "k", [(4, 2), (2, 2)]), torch.zeros(2, 2))

    whole = torch.arange(12).reshape(6, 2)
    parts = [TensorOrigin(("in",), name) for name in ("value", "query", "key")]
    thirds = [weights.convert(part, [whole]) for part in parts]
    assert [third[0, 0].item() for third in thirds] == [8, 0, 4]
    assert torch.equal(weights.restore(parts, thirds, "in", [(6, 2)]), whole)


def test_a_killed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(DATA / "act/checkpoint")
    policy, _ = read(folder)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "restore", fail)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(policy, folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert official.open_folder(folder.path).config["type"] == "act"
