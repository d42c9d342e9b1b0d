"""The commands inspect and infer, called as the command line calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc import artifact as artifacts
from rlrc.checkpoint_folder import Flags
from rlrc.errors import UserError
from rlrc.runtime.cli.policy import Infer, InspectPolicy, Verify


def test_inspect_prints_what_an_artifact_is(toy_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    InspectPolicy(toy_artifact).run()
    printed = " ".join(capsys.readouterr().out.split())
    for fact in (
        "tiny, parallel decoding",
        "corner4 32 x 32, resize none",
        "x, y (m); grip (1)",
        "dx, dy, dz (delta, m); gripper (gripper, 1); chunks of 3, 32 bins",
        "can be pruned decoder 2 heads, 64 MLP channels",
        "vision │ │ width 32",
        "layers 0, 2: 4 heads of 16, MLP 128",
        "layer 1: 2 heads of 16 (1 kv), MLP 64",
        "0 of 96",
        "success 0.25",  # after the only stage of its history
        "next: rlrc verify",
    ):
        assert fact in printed, fact


def test_inspect_json_is_the_manifest(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    InspectPolicy(tiny_artifact, json=True).run()
    printed = json.loads(capsys.readouterr().out)
    artifact = artifacts.load(tiny_artifact)
    extra = {name: printed.pop(name) for name in ("digest", "bytes")}
    assert artifacts.from_json(printed) == artifact.manifest
    assert extra["digest"] == artifact.digest
    weights = tiny_artifact / "weights/model.safetensors"
    assert extra["bytes"]["weights"] == weights.stat().st_size


def test_inspect_says_what_to_do_next(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    InspectPolicy(tiny_artifact).run()
    assert f"next: rlrc export {tiny_artifact} OUT" in capsys.readouterr().out


def save(path: Path, observation: dict[str, Any]) -> Path:
    np.savez(path, **observation)
    return path


def test_infer_answers_as_the_reference(toy_artifact: Path, tmp_path: Path, observation: dict[str, Any]) -> None:
    out = tmp_path / "new folder" / "act"  # no .npz at its end: the name is kept
    Infer(toy_artifact, save(tmp_path / "obs.npz", observation), out).run()
    golden = np.load(toy_artifact / "golden.npz")
    with np.load(out) as written:
        assert sorted(written) == ["actions", "tokens"]
        assert np.array_equal(written["tokens"], golden["tokens"][0])
        np.testing.assert_allclose(written["actions"], golden["actions"][0], rtol=1e-6)
    assert [path.name for path in out.parent.iterdir()] == ["act"]


def test_infer_json(
    toy_artifact: Path, tmp_path: Path, observation: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Infer(toy_artifact, save(tmp_path / "obs.npz", observation), tmp_path / "act.npz", json=True).run()
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens"] == np.load(toy_artifact / "golden.npz")["tokens"][0].tolist()
    assert set(printed) == {"actions", "tokens", "timing"}


def broken_file(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 no archive")


def single_array(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "found: No such file or directory"),
        (broken_file, "found: File is not a zip file"),
        (lambda path: path.write_text("text"), "expected an .npz of plain arrays"),
        (lambda path: path.write_bytes(b""), "expected an .npz of plain arrays"),
        (single_array, "found: a single array"),
        (lambda path: np.savez(path, state=np.array([{}], object)), "found: Object arrays cannot be loaded"),
        (lambda path: np.savez(path, state=np.zeros(3)), "found no image.corner4, instruction"),
    ],
)
def test_infer_refuses_a_bad_observation(
    toy_artifact: Path, tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path / "obs.npz")
    with pytest.raises(UserError) as caught:
        Infer(toy_artifact, tmp_path / "obs.npz", tmp_path / "act.npz").run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "act.npz").exists()


def test_infer_refuses_a_damaged_observation(toy_artifact: Path, tmp_path: Path, observation: dict[str, Any]) -> None:
    np.savez_compressed(tmp_path / "obs.npz", **observation)
    data = bytearray((tmp_path / "obs.npz").read_bytes())
    data[200:260] = bytes(60)
    (tmp_path / "obs.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"expected an \.npz of plain arrays at .*obs\.npz, found:"):
        Infer(toy_artifact, tmp_path / "obs.npz", tmp_path / "act.npz").run()


def test_infer_keeps_an_output_that_is_there(toy_artifact: Path, tmp_path: Path, observation: dict[str, Any]) -> None:
    (tmp_path / "act.npz").write_text("precious")
    with pytest.raises(UserError, match="already there"):
        Infer(toy_artifact, save(tmp_path / "obs.npz", observation), tmp_path / "act.npz").run()
    assert (tmp_path / "act.npz").read_text() == "precious"


def test_a_policy_without_an_answer_exits_with_1(
    make_toy: Callable[..., Path],
    toy: Any,
    tmp_path: Path,
    observation: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = make_toy(tmp_path / "broken", weights=replace(toy, head=np.full_like(toy.head, np.nan)))
    commands: list[Any] = [Infer(broken, save(tmp_path / "obs.npz", observation), tmp_path / "act.npz"), Verify(broken)]
    for command in commands:
        assert command.run() == 1
        assert capsys.readouterr().err == "rlrc: check failed: expected finite logits, found 384 nan or inf\n"
    assert not (tmp_path / "act.npz").exists()


def test_what_an_artifact_says_itself_is_not_told(
    toy_artifact: Path, tmp_path: Path, observation: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"with an official checkpoint only, found the artifact .*toy"):
        Infer(
            toy_artifact,
            save(tmp_path / "obs.npz", observation),
            tmp_path / "act.npz",
            checkpoint=Flags(unnorm_key="a"),
        ).run()
