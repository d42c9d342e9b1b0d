"""rlrc inspect, infer and write-back on official folders, as the command line calls them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed_folders import copied, edited
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from rlrc.compressor.checkpoints import geometry, reader, shapes
from rlrc.compressor.checkpoints import tensors as weights
from rlrc.compressor.checkpoints.shapes import Language, Vision
from rlrc.runtime.cli import main

DATA = Path(__file__).parent / "data"
FAMILIES = ("act", "openvla", "openvla-oft-discrete", "openvla-oft-l1", "pi0", "pi05", "smolvla")
TOKENIZERS = {"pi0": "pi0/tokenizer", "pi05": "pi05/tokenizer", "smolvla": "smolvla/tiny_smolvlm"}


def golden(family: str) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    return np.load(DATA / family / "golden.npz"), json.loads((DATA / family / "golden.json").read_text())


def observation(family: str, row: int) -> dict[str, Any]:
    """A golden's, named as OBS.npz names it."""
    arrays, described = golden(family)
    observed = {}
    for name in arrays:
        start, _, rest = name.partition(".")
        if start == f"obs{row}" and rest.startswith(("image", "state")):
            rest = rest.removeprefix("image.")
            observed[rest if rest == "state" else f"image.{rest}"] = arrays[name]
    if "instruction" in described["observations"][row]:
        observed["instruction"] = np.array(described["observations"][row]["instruction"])
    if "noise" in arrays:
        observed["noise"] = arrays["noise"][row]
    return observed


def flags(family: str) -> list[str]:
    tokenizer = TOKENIZERS.get(family, "openvla/checkpoint" if "oft" in family else None)
    given = [] if tokenizer is None else ["--tokenizer", str(DATA / tokenizer)]
    return ["--hints", str(DATA / family / "golden.json"), *given]


def infer(family: str, row: int, folder: Path, *more: str, **changed: Any) -> int:
    np.savez(folder / "obs.npz", **{**observation(family, row), **changed})
    command = ["infer", str(DATA / family / "checkpoint"), str(folder / "obs.npz"), "--out", str(folder / "act.npz")]
    return main([*command, *flags(family), *more])


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_infer_gives_the_reference_actions(family: str, row: int, tmp_path: Path) -> None:
    assert infer(family, row, tmp_path) == 0
    arrays, _ = golden(family)
    actions = arrays["actions"][row] if "actions" in arrays else arrays[f"obs{row}.actions"]
    tokens = f"obs{row}.tokens"
    with np.load(tmp_path / "act.npz") as written:
        assert written["actions"].dtype == np.float32
        np.testing.assert_allclose(written["actions"], actions.reshape(written["actions"].shape), rtol=0, atol=1e-5)
        assert sorted(written) == (["actions", "tokens"] if tokens in arrays else ["actions"])
        if tokens in arrays:
            assert np.array_equal(written["tokens"].ravel(), arrays[tokens].ravel())


def test_infer_draws_the_noise_that_is_not_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same each time, and the same as the runtime's: numpy's generator started with 0."""
    arrays, _ = golden("pi0")
    noise = np.random.default_rng(0).standard_normal(arrays["noise"].shape[1:], np.float32)
    assert infer("pi0", 0, tmp_path, "--json", noise=noise) == 0
    given = json.loads(capsys.readouterr().out)
    np.savez(tmp_path / "bare.npz", **{k: v for k, v in observation("pi0", 0).items() if k != "noise"})
    command = ["infer", str(DATA / "pi0/checkpoint"), str(tmp_path / "bare.npz"), "--out", str(tmp_path / "b.npz")]
    assert main([*command, *flags("pi0"), "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert drawn["actions"] == given["actions"]
    assert set(drawn) == {"actions", "timing"}


def test_weights_that_give_no_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(DATA / "act/checkpoint", tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.action_head.weight": torch.full((6, 32), 3e38)}, folder / "model.safetensors")
    np.savez(tmp_path / "obs.npz", **observation("act", 0))
    assert main(["infer", str(folder), str(tmp_path / "obs.npz"), "--out", str(tmp_path / "act.npz")]) == 1
    assert "check failed: expected finite actions, found nan or inf" in capsys.readouterr().err
    assert not (tmp_path / "act.npz").exists()


def llama_model(path: Path) -> None:
    """The golden's tokenizer as a sentencepiece model, a protocol buffer written by hand.

    Scores fall with the rank of the merge that makes a piece, so that they tell the same merges.
    """
    vocabulary = json.loads((DATA / "openvla/checkpoint/tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]]
    scores = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}

    def field(number: int, data: bytes) -> bytes:
        assert len(data) < 128
        return bytes([number << 3 | 2, len(data)]) + data

    model = b""
    for piece, _ in sorted(vocabulary["vocab"].items(), key=lambda item: item[1])[:32000]:
        kind = kinds.get(piece, 6 if piece.startswith("<0x") else 1)
        score = np.float32(scores.get(piece, -1e6)).tobytes()
        model += field(1, field(1, piece.encode()) + b"\x15" + score + bytes([3 << 3, kind]))
    trainer = bytes([3 << 3, 2]) + b"\x98\x02\x01"  # BPE; byte_fallback (35) true
    normalizer = bytes([3 << 3, 1, 4 << 3, 0])  # add_dummy_prefix true, remove_extra_whitespaces false
    path.write_bytes(model + field(2, trainer) + field(3, normalizer))


def test_a_sentencepiece_model_in_the_place_of_tokenizer_json(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "openvla/checkpoint", tmp_path / "folder")
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "tokenizer.json").unlink()
    llama_model(folder / "tokenizer.model")
    np.savez(tmp_path / "obs.npz", **observation("openvla", 0))
    command = ["infer", str(folder), str(tmp_path / "obs.npz"), "--out", str(tmp_path / "act.npz")]
    assert main([*command, *flags("openvla")]) == 0
    with np.load(tmp_path / "act.npz") as written:
        assert np.array_equal(written["tokens"].ravel(), golden("openvla")[0]["obs0.tokens"])
    assert reference.token_to_id("▁") == 29871


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image.other": np.zeros((8, 8, 3), np.uint8)}, "unknown image.other"),
        ({"state": np.zeros(5, np.float32)}, "expected state of shape (6,), found (5,)"),
        ({"noise": np.zeros((3, 2), np.float32)}, "noise"),
        ({"instruction": np.array(" ")}, "expected instruction to be a non-empty string"),
    ],
)
def test_observations_that_do_not_fit(
    changed: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer("pi0", 0, tmp_path, **changed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "act.npz").exists()


@pytest.mark.parametrize("command", ["inspect", "infer"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").write_text('{"type": "pi0_fast"}'), "found 'pi0_fast' in"),
        (lambda folder: (folder / "model.safetensors").unlink(), "found neither"),
        (lambda folder: (folder / "config.json").write_text("{"), "expected JSON in"),
    ],
)
def test_bad_folders_are_refused_in_one_line(
    command: str, break_it: Callable[[Path], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(DATA / "pi0/checkpoint", tmp_path / "folder")
    break_it(folder)
    np.savez(tmp_path / "obs.npz", **observation("pi0", 0))
    rest = [str(tmp_path / "obs.npz"), "--out", str(tmp_path / "act.npz")] if command == "infer" else []
    assert main([command, str(folder), *rest, *flags("pi0")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlrc: error: expected ")
    assert message in line


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(DATA / family / "checkpoint"), *flags(family)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(DATA / family / "checkpoint"), *flags(family), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tensors = load_file(DATA / family / "checkpoint/model.safetensors")
    for path in (DATA / family / "checkpoint").glob("*.pt"):
        tensors |= {f"{path}.{name}": weights.of_pt(path).read(name) for name in weights.of_pt(path)}
    total = sum(tensor.numel() for tensor in tensors.values())
    assert (facts["parameters"], facts["tensors"]) == (total, len(tensors))
    assert facts["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(part["parameters"] for part in facts["components"].values()) == total
    assert sum(facts["modules"].values()) + facts["unused"]["parameters"] == total
    action = facts["policy"]["action"]
    for fact in (
        f"{total:,} in {len(tensors)} tensors",
        f"{facts['bytes']:,} as bfloat16",
        f"{action['names'][-1]} ({action['meaning'][-1]}, {action['units'][-1]})",
        f"chunks of {action['horizon']}",
        *(f"{c['name']} {c['height']} x {c['width']}" for c in facts["policy"]["cameras"]),
        *facts["modules"],
        "next: rlrc infer",
    ):
        assert fact in printed, fact


def test_inspect_does_not_need_to_know_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(DATA / "openvla/checkpoint", tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (stats,) = config["norm_stats"].values()
    (folder / "config.json").write_text(json.dumps({**config, "norm_stats": {"b": stats, "a": stats}}))
    assert main(["inspect", str(folder), *flags("openvla")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "data sets a, b" in shown
    assert "action: bounds_q99 by q01, q99 of a.action in norm_stats of config.json" in shown
    assert f"next: rlrc infer {folder} OBS.npz --out ACT.npz --unnorm-key KEY, or rlrc prune" in shown
    np.savez(tmp_path / "obs.npz", **observation("openvla", 0))
    command = ["infer", str(folder), str(tmp_path / "obs.npz"), "--out", str(tmp_path / "act.npz"), *flags("openvla")]
    assert main(command) == 2
    assert "found a, b; choose one with --unnorm-key" in capsys.readouterr().err
    assert main([*command, "--unnorm-key", "c"]) == 2
    assert "expected one of the data sets a, b" in capsys.readouterr().err
    assert main([*command, "--unnorm-key", "a"]) == 0


def test_geometry_of_openvla_7b(capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers are those of openvla/openvla's own module on the meta device."""
    assert main(["inspect", "--geometry", "openvla-7b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["parameters"], facts["tensors"]) == (7_541_237_184, 982)
    parts = {name: (round(part["parameters"] / 1e6, 1), part["tensors"]) for name, part in facts["components"].items()}
    assert parts == {
        "featurizer": (303.2, 343),
        "fused_featurizer": (427.7, 342),
        "projector": (71.4, 6),
        "language_model": (6738.9, 291),
    }
    assert main(["inspect", "--geometry", "openvla-7b"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "7,541,237,184 in 982 tensors" in printed
    assert "15,082,474,368 as bfloat16" in printed


# As published: ACT 52 M with its VAE, SmolVLA 450 M, pi0 3.3 B; lerobot stores two heads of 257,152 rows besides.
@pytest.mark.parametrize(
    ("name", "parameters", "towers"),
    [
        ("openvla-7b", 7_541_237_184, {"vision": 23, "vision2": 26, "decoder": 32}),
        ("openvla-oft-7b", 7_541_237_184 + 151_117_831 + 16_818_176, {"vision": 23, "vision2": 26, "decoder": 32}),
        ("pi0", 3_238_048_528 + 2048 * 257_152 + 1024 * 257_152, {"vision": 27, "decoder": 18, "expert": 18}),
        ("pi05", None, {"vision": 27, "decoder": 18, "expert": 18}),
        ("smolvla", 450_046_176, {"vision": 12, "decoder": 16, "expert": 16}),
        ("act", 51_685_006, {"encoder": 4, "decoder": 2}),
    ],
)
def test_geometries_build_on_the_meta_device(name: str, parameters: int | None, towers: dict[str, int]) -> None:
    folder, options = geometry.folder(name)
    layout = reader.layout(folder, options)
    policy = reader.build(layout)
    reader.check(folder, layout, policy)
    assert all(tensor.is_meta for tensor in policy.state_dict().values())
    assert {tower: len(spec.layers) for tower, spec in layout.towers.items()} == towers
    files = reader.sources(folder, layout).values()
    total = sum(prod(tensors.shape(tensor)) for tensors in files for tensor in tensors)
    assert parameters is None or total == parameters


TINY = {
    "openvla": lambda: shapes.openvla(
        Vision(24, 3, 96, 14, 16), Vision(16, 3, 56, 14, 16), Language(16, 3, 2, 2, 8, 44), 32064
    ),
    "pi0": lambda: shapes.pi0(
        Vision(24, 2, 48, 16, 16),
        Language(32, 3, 4, 1, 16, 64),
        Language(24, 3, 4, 1, 16, 48),
        512,
        32,
        32,
        False,
        True,
    ),
    "pi05": lambda: shapes.pi0(
        Vision(24, 2, 40, 16, 16), Language(32, 3, 4, 1, 16, 56), Language(24, 3, 4, 1, 16, 40), 512, 32, 32, True, True
    ),
    "smolvla": lambda: shapes.smolvla(
        Vision(24, 2, 48, 16, 16), 2, Language(48, 4, 3, 1, 16, 96), Language(36, 4, 3, 1, 16, 256), 2, 320, 32, 32
    ),
    "act": lambda: shapes.act(8, 32, 64, (2, 1, 1), 8, 8, 6, 6),
}


@pytest.mark.parametrize("family", TINY)
def test_shapes_are_those_that_the_official_code_saves(family: str) -> None:
    tensors = weights.of_model(DATA / family / "checkpoint")
    assert TINY[family]() == {name: tensors.shape(name) for name in tensors}


def test_shapes_of_the_oft_heads() -> None:
    for file, expected in (
        ("action_head", shapes.oft_head(16, 7)),
        ("proprio_projector", shapes.oft_proprioception(16, 8)),
    ):
        (path,) = (DATA / "openvla-oft-l1/checkpoint").glob(f"{file}--*.pt")
        tensors = weights.of_pt(path)
        assert expected == {name: tensors.shape(name) for name in tensors}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--geometry", "openvla"],
            "expected one of the geometries openvla-7b, .*, found 'openvla'; the nearest is openvla",
        ),
        ([], "expected either a path or --geometry, found both or neither"),
        (["somewhere", "--geometry", "act"], "expected either a path or --geometry"),
    ],
)
def test_inspect_with_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_write_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights on the 4-bit grid, in the format they came in: they differ by little, and nothing else does."""
    source, artifact, out = DATA / "pi0/checkpoint", tmp_path / "artifact", tmp_path / "out"
    assert main(["quantize", str(source), str(artifact), *flags("pi0")]) == 0
    command = ["write-back", str(artifact), str(out), "--like", str(source), *flags("pi0")]
    assert main(command) == 0
    assert f"{out}: the weights of {artifact} in the format of {source}" in capsys.readouterr().out
    changed = {path.name for path in source.iterdir() if path.read_bytes() != (out / path.name).read_bytes()}
    assert changed == {"model.safetensors"}
    old, new = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert {name: (t.shape, t.dtype) for name, t in old.items()} == {
        name: (t.shape, t.dtype) for name, t in new.items()
    }
    name = "model.paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.gate_proj.weight"
    error = (old[name].float() - new[name].float()).abs().max()
    assert 0 < error < old[name].float().abs().max() / 10
    assert main(command) == 2
    assert "expected a new output" in capsys.readouterr().err


def test_an_artifact_needs_no_flags(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_artifact), "--unnorm-key", "bridge_orig"]) == 2
    assert "with an official checkpoint only" in capsys.readouterr().err


def test_inspecting_an_artifact_does_not_import_torch(toy_artifact: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]}; from rlrc.runtime.cli import main; "
        f"main(['inspect', {str(toy_artifact)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("openvla", "action: bounds_q99 by q01, q99 of bridge_orig.action in norm_stats of config.json"),
        (
            "openvla-oft-l1",
            "state: bounds_q99 by q01, q99 of libero_spatial_no_noops.proprio in dataset_statistics.json",
        ),
    ],
)
def test_inspect_shows_the_statistics_of_openvla(family: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = ["--images", "2"] if family == "openvla-oft-l1" else []
    assert main(["inspect", str(DATA / family / "checkpoint"), *flags(family), *images]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert line in shown
    assert "image.image0: MEAN_STD by tvf_normalize_params of preprocessor_config.json" in shown


@pytest.mark.parametrize(
    ("left", "origin"),
    [
        (("means", "stds"), "means, stds of preprocessor_config.json"),
        ((), "the vision backbones, for preprocessor_config.json has none"),
    ],
)
def test_inspect_shows_which_means_of_pictures_are_taken(
    left: tuple[str, ...], origin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fewer(values: Any) -> None:
        for key in {"tvf_normalize_params", "means", "stds"} - set(left):
            values.pop(key, None)

    def unnamed(values: Any) -> None:
        (values["norm_stats"],) = values["norm_stats"].values()

    changes = edited("preprocessor_config.json", fewer), edited("config.json", unnamed)
    assert main(["inspect", str(copied("openvla", tmp_path, *changes)), *flags("openvla")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"image.image0: MEAN_STD by {origin}" in shown
    assert "action: bounds_q99 by q01, q99 of action in norm_stats of config.json" in shown
