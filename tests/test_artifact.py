"""The artifact: strict reading, atomic writing, and a writer that is really killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlrc import artifact
from rlrc.artifact import ArtifactError, Manifest, create_artifact, from_json, load, to_json
from rlrc.errors import UserError

RUNTIME = str(Path(artifact.__file__).parents[2])


def manifest() -> Manifest:
    """A small one that uses every part: optionals set and unset, dictionaries, dynamic shapes, nested values."""
    norm = artifact.NormStats((0.0, 0.5), (1.0, 2.0), clip=1.0)
    return Manifest(
        policy=artifact.PolicySpec(
            family="tiny",
            decode="parallel",
            cameras=(artifact.CameraSpec("corner", 96, 64, "none", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "HWC"),),
            state=artifact.StateSpec(("x", "y"), ("m", "m"), artifact.NormStats((0.0, 0.0), (1.0, 1.0))),
            prompt=artifact.PromptSpec("do {instruction}", 12, 0),
            action=artifact.ActionSpec(5, ("dx", "grip"), ("delta", "gripper"), ("m", "1"), norm, 256),
            geometry={"vocabulary": 64, "stem": [4, 2], "nested": {"a": [True, None, 1.5, "é"]}},
        ),
        towers={
            "decoder": artifact.TowerSpec(64, (artifact.LayerSpec(4, 2, 16, 128), artifact.LayerSpec(0, 0, 16, 0)))
        },
        parameters=1234,
        dtype="int4",
        quantization=artifact.QuantizationSpec("int4", 32, {"decoder.q": 4, "head": 8}),
        graphs=(
            artifact.GraphSpec(
                name="vision",
                backend="onnxruntime",
                file="graphs/onnx/vision.onnx",
                precision="int4",
                inputs=(artifact.TensorSpec("pixels", "float32", ("batch", 96, 64, 3)),),
                outputs=(artifact.TensorSpec("tokens", "float32", ("batch", 24, 64)),),
                needs={"onnxruntime": ">=1.18"},
            ),
        ),
        verified=(artifact.VerifiedSpec("onnxruntime", 16, 160, 1, 0, (1e-4, 2e-9), 1e-3, 0.01, {"torch": "2"}),),
        history=(artifact.HistoryEntry("new", {"seed": 0, "rate": 1e-3}, "0.1.0", None, 0.5, after={"success": 0.25}),),
    )


def write(out: Path, weights: bytes = b"weights" * 100) -> Path:
    with create_artifact(out) as draft:
        draft.file("weights/model.safetensors").write_bytes(weights)
        draft.file("graphs/onnx/vision.onnx").write_bytes(b"graph")
        draft.file("empty").touch()
        draft.finish(manifest())
    return out


def values() -> dict[str, Any]:
    """The JSON of a manifest whose files agree with its graphs."""
    files = {"graphs/onnx/vision.onnx": artifact.FileSpec("0" * 64, 5)}
    return to_json(dataclasses.replace(manifest(), files=files))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes manifest.json in place, as no tool of ours ever does."""
    described = json.loads((folder / "manifest.json").read_text())
    change(described)
    (folder / "manifest.json").write_text(json.dumps(described))


def is_one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(error.value) and "expected" in str(error.value) and "found" in str(error.value)


# Round trips


def test_a_manifest_survives_json() -> None:
    text = json.dumps(values(), allow_nan=False)
    again = from_json(json.loads(text))
    assert again == dataclasses.replace(manifest(), files=again.files)
    assert isinstance(again.policy.cameras, tuple)
    assert isinstance(again.graphs[0].inputs[0].shape, tuple)
    assert to_json(again) == json.loads(text)


def test_whole_numbers_are_numbers() -> None:
    described = values()
    described["policy"]["action"]["norm"]["center"] = [0, 1]
    center = from_json(described).policy.action.norm.center
    assert center == (0.0, 1.0)
    assert all(type(value) is float for value in center)


def test_an_artifact_survives_the_disk(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "new" / "deeper" / "a"))
    described = (loaded.path / "manifest.json").read_bytes()
    assert set(loaded.manifest.files) == {"weights/model.safetensors", "graphs/onnx/vision.onnx", "empty"}
    assert loaded.manifest.files["weights/model.safetensors"].size == 700
    # sha256 of nothing, a known constant
    assert loaded.manifest.files["empty"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert dataclasses.replace(loaded.manifest, files={}) == manifest()
    assert loaded.digest == hashlib.sha256(described).hexdigest()
    assert os.listdir(tmp_path / "new" / "deeper") == ["a"]


def test_a_key_with_a_default_may_be_missing() -> None:
    described = values()
    del described["history"], described["policy"]["action"]["norm"]["clip"]
    assert from_json(described).history == ()
    assert from_json(described).policy.action.norm.clip is None


# Refusals of the manifest

CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda m: m["policy"]["cameras"][0].update(fov=60), r"policy\.cameras\[0\]\.fov"),
    "missing key": (lambda m: m["policy"]["action"].pop("bins"), r"policy\.action\.bins, found none"),
    "missing files": (lambda m: m.pop("files"), "files, found none"),
    "string for an integer": (lambda m: m.update(parameters="12"), r"an integer at parameters, found '12'"),
    "boolean for an integer": (lambda m: m.update(parameters=True), r"an integer at parameters, found True"),
    "fraction for an integer": (lambda m: m.update(parameters=1.5), r"an integer at parameters, found 1\.5"),
    "null": (lambda m: m["policy"].update(family=None), r"a string at policy\.family"),
    "object for a list": (lambda m: m.update(graphs={}), r"a list at graphs"),
    "list for an object": (lambda m: m.update(towers=[]), r"an object at towers"),
    "optional of a wrong type": (lambda m: m["policy"].update(state=3), r"policy\.state, found 3"),
    "member of a union": (
        lambda m: m["graphs"][0]["inputs"][0].update(shape=[1.5]),
        r"graphs\[0\]\.inputs\[0\]\.shape\[0\]",
    ),
    "unknown choice": (lambda m: m["policy"].update(decode="magic"), r"one of 'parallel'.* at policy\.decode"),
    "half a colour": (
        lambda m: m["policy"]["cameras"][0].update(mean=[0, 0]),
        r"three numbers for every encoder .*found \(2, 3\)",
    ),
    "deep in a dictionary": (
        lambda m: m["towers"]["decoder"]["layers"][1].pop("mlp"),
        r"towers\.decoder\.layers\[1\]\.mlp",
    ),
    "lengths that disagree": (
        lambda m: m["policy"]["action"]["norm"].update(center=[0]),
        "one length at policy.action",
    ),
    "zero scale": (lambda m: m["policy"]["state"]["norm"].update(scale=[1, 0]), r"positive numbers at policy\.state"),
    "meaning of a dimension": (
        lambda m: m["policy"]["action"].update(meaning=["delta"]),
        r"2 entries at policy\.action\.meaning",
    ),
    "no horizon": (lambda m: m["policy"]["action"].update(horizon=0), "horizon"),
    "same camera twice": (lambda m: m["policy"]["cameras"].append(m["policy"]["cameras"][0]), "each name once"),
    "camera without height": (lambda m: m["policy"]["cameras"][0].update(height=0), "height"),
    "impossible heads": (
        lambda m: m["towers"]["decoder"]["layers"][0].update(kv_heads=3),
        r"towers\.decoder\.layers\[0\]",
    ),
    "int4 without its grid": (lambda m: m.update(quantization=None), "quantization exactly where dtype is int4"),
    "graph without its file": (lambda m: m["graphs"][0].update(file="elsewhere.onnx"), "elsewhere.onnx among files"),
    "path out of the folder": (lambda m: m["files"].update({"../x": m["files"]["graphs/onnx/vision.onnx"]}), "'../x'"),
    "absolute path": (lambda m: m["files"].update({"/etc/x": m["files"]["graphs/onnx/vision.onnx"]}), "'/etc/x'"),
    "newer format": (lambda m: m.update(format_version=2, policy="new shape"), "found 2, which is newer; upgrade rlrc"),
    "no format": (lambda m: m.pop("format_version"), "format_version None"),
    "format zero": (lambda m: m.update(format_version=0), "format_version 0"),
    "infinity": (
        lambda m: m["verified"][0].update(tolerance=float("inf")),
        r"a finite number at verified\[0\]\.tolerance",
    ),
    "NaN in free values": (
        lambda m: m["history"][0]["after"].update(success=float("nan")),
        r"a finite number at history\[0\]\.after\.success",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_does_not_fit_is_refused(name: str) -> None:
    change, message = CHANGES[name]
    described = values()
    change(described)
    with pytest.raises(ArtifactError, match=message) as error:
        from_json(described)
    assert is_one_line(error)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100_000])
def test_a_text_that_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ArtifactError) as error:
        load(tmp_path)
    assert is_one_line(error)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), object(), Path("x"), b"bytes", {1: 2}, {"a"}])
def test_what_json_cannot_hold_is_refused_with_its_key(value: object) -> None:
    entry = dataclasses.replace(manifest().history[0], config={"deep": [value]})
    with pytest.raises(ArtifactError, match=r"history\[0\]\.config\.deep\[0\]"):
        to_json(dataclasses.replace(manifest(), graphs=(), history=(entry,)))


# Refusals of the folder


def test_truncated_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    os.truncate(folder / "weights/model.safetensors", 699)
    for verify in (None, ()):  # sizes are always checked
        with pytest.raises(ArtifactError, match=r"expected 700 bytes in .*model\.safetensors, found 699") as error:
            load(folder, verify=verify)
        assert is_one_line(error)


def test_missing_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "weights/model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"expected the file .*model\.safetensors, found none") as error:
        load(folder, verify=())
    assert is_one_line(error)


def test_wrong_hash(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "weights/model.safetensors").write_bytes(b"weightz" * 100)
    for verify in (None, ["weights"], ["weights/model.safetensors"], "weights"):
        with pytest.raises(ArtifactError, match=r"expected sha256 .*model\.safetensors, found") as error:
            load(folder, verify=verify)
        assert is_one_line(error)
    load(folder, verify=["graphs", "weight"])  # a robot that reads the graphs only; "weight" is no folder's name


def test_wrong_hash_in_the_manifest(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    edit(folder, lambda m: m["files"]["empty"].update(sha256="0" * 64))
    with pytest.raises(ArtifactError, match="expected sha256 0000"):
        load(folder)


def test_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, found in (("nothing", "found nothing"), ("file", "found a file"), ("folder", "No such file")):
        with pytest.raises(ArtifactError, match=found) as error:
            load(tmp_path / name)
        assert is_one_line(error)


def test_a_file_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "a"))
    assert loaded.file("empty").read_bytes() == b""
    (loaded.path / "stray").touch()
    with pytest.raises(ArtifactError, match="expected stray in the artifact"):
        loaded.file("stray")


# Outputs


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (tmp_path / "link").symlink_to("nowhere")
    for out in (folder, folder / "manifest.json", tmp_path / "link"):
        with pytest.raises(UserError, match="already there") as error, create_artifact(out):
            pytest.fail("the body ran")
        assert is_one_line(error)
    load(folder)


# These fail for root as well, who passes every permission check.
@pytest.mark.parametrize("out", ["file/a", "file/deeper/a", "/proc/a", "/proc/deeper/a", "x" * 300])
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected to") as error, create_artifact(tmp_path / out):
        pytest.fail("the body ran")
    assert is_one_line(error)
    assert os.listdir(tmp_path) == ["file"]


def test_checking_an_output_leaves_nothing(tmp_path: Path) -> None:
    artifact.check_output(tmp_path / "deeper" / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("finished", [False, True])
def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, raised: type[BaseException], finished: bool) -> None:
    with pytest.raises(raised), create_artifact(tmp_path / "new" / "a") as draft:
        draft.file("graphs/onnx/vision.onnx").write_bytes(b"graph")
        if finished:
            draft.finish(manifest())
        raise raised
    assert os.listdir(tmp_path) == []


def test_a_writer_that_forgets_to_finish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"finish\(\) was not called"), create_artifact(tmp_path / "a") as draft:
        draft.file("x").touch()
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_would_not_load_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"vision\.onnx among files"), create_artifact(tmp_path / "a") as draft:
        draft.finish(manifest())
    assert os.listdir(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="created meanwhile"), create_artifact(tmp_path / "a") as draft:
        draft.file("graphs/onnx/vision.onnx").touch()
        draft.finish(manifest())
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "precious").touch()
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["precious"]


def test_paths_of_a_draft_stay_inside(tmp_path: Path) -> None:
    for relative in ("../x", "/x", "a/../x", "manifest.json", ".", "a//b"):
        with pytest.raises(RuntimeError, match="plain relative path"), create_artifact(tmp_path / "a") as draft:
            draft.file(relative)
    assert os.listdir(tmp_path) == []


def test_a_living_writers_draft_is_left_alone(tmp_path: Path) -> None:
    with create_artifact(tmp_path / "a") as draft:
        draft.file("graphs/onnx/vision.onnx").write_bytes(b"graph")
        again = (
            f"from rlrc.folders import create_folder\nwith create_folder({str(tmp_path / 'a')!r}): raise SystemExit(3)"
        )
        ended = subprocess.run([sys.executable, "-c", again], env=os.environ | {"PYTHONPATH": RUNTIME}, check=False)
        assert ended.returncode == 3
        draft.finish(manifest())
    load(tmp_path / "a")


# Inheritance


def test_inherited_files_are_the_parents(tmp_path: Path) -> None:
    parent = load(write(tmp_path / "parent"))
    with create_artifact(tmp_path / "child") as draft:
        draft.inherit(parent, "graphs", "weights/model.safetensors", "weight", "no/such/folder")
        draft.finish(manifest())
    child = load(tmp_path / "child")
    assert set(child.manifest.files) == {"weights/model.safetensors", "graphs/onnx/vision.onnx"}
    for relative, spec in child.manifest.files.items():
        assert spec == parent.manifest.files[relative]


def test_inherited_files_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = load(write(tmp_path / "parent"))

    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with create_artifact(tmp_path / "child") as draft:
        draft.inherit(parent, "graphs")
        draft.finish(manifest())
    assert load(tmp_path / "child").file("graphs/onnx/vision.onnx").read_bytes() == b"graph"


def test_an_inherited_file_is_not_written_through(tmp_path: Path) -> None:
    parent = load(write(tmp_path / "parent"))
    with (
        pytest.raises(RuntimeError, match="do not inherit what you rewrite"),
        create_artifact(tmp_path / "child") as draft,
    ):
        draft.inherit(parent, "graphs")
        draft.file("graphs/onnx/vision.onnx")
    load(tmp_path / "parent")


def test_damage_is_not_inherited(tmp_path: Path) -> None:
    parent = load(write(tmp_path / "parent"), verify=())
    (parent.path / "graphs/onnx/vision.onnx").write_bytes(b"grapH")
    with pytest.raises(ArtifactError, match="expected sha256"), create_artifact(tmp_path / "child") as draft:
        draft.inherit(parent, "graphs")
        draft.finish(manifest())
    assert os.listdir(tmp_path) == ["parent"]


# A writer that is really killed

WRITER = """
import json, os, sys
from pathlib import Path
from rlrc.artifact import from_json, create_artifact
manifest = from_json(json.loads(Path(sys.argv[2]).read_text()))
print("start", flush=True)
with create_artifact(sys.argv[1]) as draft:
    for name in ("graphs/onnx/vision.onnx", "weights/model.safetensors", "golden.npz"):
        with draft.file(name).open("wb") as stream:
            for _ in range(512):
                stream.write(os.urandom(8192))
                stream.flush()
    draft.finish(manifest)
"""


def test_sigkill_leaves_no_artifact_or_a_whole_one(tmp_path: Path) -> None:
    description = tmp_path / "description.json"
    description.write_text(json.dumps(values()))
    out = tmp_path / "out" / "a"
    command = [sys.executable, "-c", WRITER, str(out), str(description)]
    environment = os.environ | {"PYTHONPATH": RUNTIME}

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        assert process.stdout.readline() == b"start\n"
        return process

    def discard() -> None:
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        out.rmdir()

    with start() as process:
        began = time.perf_counter()
        assert process.wait() == 0
        duration = time.perf_counter() - began
    load(out)
    discard()

    whole = partial = 0
    choose = random.Random(0)
    for moment in range(20):
        # One moment in each twentieth of the time a writer takes, and a little beyond.
        delay = (moment + choose.random()) / 20 * duration * 1.3
        with start() as process:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
        if out.exists():
            assert set(load(out).manifest.files) >= {"weights/model.safetensors", "golden.npz"}
            discard()
            whole += 1
        partial += any(path.name.startswith(".a.partial-") for path in out.parent.iterdir())
    assert partial > 0, "no writer was killed at work; the test has lost its point"
    print(f"{duration:.3f} s; of 20 killed writers {whole} were through and {partial} left a draft")

    with start() as process:
        assert process.wait() == 0
    load(out)
    assert os.listdir(out.parent) == ["a"]
