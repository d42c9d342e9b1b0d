"""Races against other runtimes: turns, reasons for who is left out, and that all compute the same policy."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlrc.benchmarks.results import results

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Any:
    """The scripts' folders on the path, and nothing of them left among the modules."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for folder in (ROOT / "scripts", PEERS):
            patch.syspath_prepend(str(folder))
        yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith((str(PEERS), str(ROOT / "scripts"))):
            del sys.modules[name]


@pytest.fixture
def race() -> ModuleType:
    import race

    return race


def script(folder: Path, name: str, body: str) -> str:
    """A contestant that defines ``main``."""
    file = folder / f"{name}.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(PEERS)!r})\nfrom protocol import *\n{body}\nserve(main)\n")
    return str(file)


def steady(folder: Path, name: str, milliseconds: float, actions: str = "[[1.0, 2.0]]") -> Any:
    from contestants import Contestant

    body = (
        "import time\n"
        f"def infer():\n    print('noise of a library')\n    time.sleep({milliseconds / 1e3})\n    return {actions}\n"
        "def main():\n    return Opened(infer, 'fp32', 'clockwork 1')"
    )
    return Contestant(name, sys.executable, script(folder, name, body), [])


def test_all_make_a_chunk_in_turn_and_are_compared(race: ModuleType, tmp_path: Path) -> None:
    entered = [steady(tmp_path, "ours", 5), steady(tmp_path, "other", 60, "[[1.5, 2.0]]")]
    left_out, load = race.race(entered, 1, 4, lambda _: None)
    assert left_out == {}
    assert len(load) == 4
    told = {"name": "x", "policy": "x", "ours": "ours", "reference": "other", "wanted": 3.0, "note": "Clockwork."}
    found = race.result(told, entered, left_out)
    for one in entered:
        one.close()
    ours, other = found["rows"]
    assert len(ours["trials_ms"]) == 4
    assert (ours["version"], ours["precision"]) == ("clockwork 1", "fp32")
    assert ours["latency_ms"]["p50"] >= 5
    assert other["latency_ms"]["p50"] >= 60
    assert ours["action_difference"] == 0.5
    assert ours["action_difference_mean"] == 0.25
    assert other["action_difference"] == 0
    assert other["peak_rss"] > 1e6
    assert ours["cpu_ms"]["p50"] < ours["latency_ms"]["p50"]  # it slept
    value, low, high = found["ratios"]["other"]
    assert 1 < value <= 13
    assert low <= value <= high


RAISES = "def main():\n    def fail():\n        raise ValueError('bf16\\nis not done')\n    return Opened(fail, '', '')"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def main():\n    import a_module_that_nobody_has", "ModuleNotFoundError: No module named"),
        (RAISES, "ValueError: bf16"),
        ("import os\ndef main():\n    os._exit(9)", "ended with code 9"),
    ],
)
def test_who_cannot_take_part_is_left_out_with_the_reason(
    race: ModuleType, tmp_path: Path, body: str, reason: str
) -> None:
    from contestants import Contestant

    broken = Contestant("broken", sys.executable, script(tmp_path, "broken", body), [])
    entered = [steady(tmp_path, "ours", 1), broken, Contestant("absent", "/nowhere/python", "run_lerobot.py", [])]
    left_out, _ = race.race(entered, 1, 2, lambda _: None)
    found = race.result({"ours": "ours", "reference": "broken", "note": ""}, entered, left_out)
    entered[0].close()
    assert reason in left_out["broken"]
    assert "/nowhere/python cannot be run: No such file" in left_out["absent"]
    assert [row["name"] for row in found["rows"]] == ["ours", "broken", "absent"]
    assert found["ratios"] == {}
    json.dumps(found)


def test_our_artifact_as_a_contestant(toy_artifact: Path, observation: dict[str, Any], tmp_path: Path) -> None:
    from contestants import Contestant

    from rlrc.runtime.inference.policy import LocalPolicy

    np.savez(tmp_path / "seen.npz", **observation)
    one = Contestant("toy", sys.executable, "run_rlrc.py", [str(toy_artifact), str(tmp_path / "seen.npz"), "1"])
    one.start(1)
    assert min(one.act()) > 0
    actions = np.array(one.ask("actions")["actions"])
    one.close()
    np.testing.assert_array_equal(
        actions.astype(np.float32), LocalPolicy.load(toy_artifact).infer(observation)["actions"]
    )


def test_checkpoint_in_lerobots_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small one written by the same code is read by our reader, takes the race's observation and answers."""
    pytest.importorskip("torch")
    import checkpoint

    from rlrc.checkpoint_folder import Flags
    from rlrc.compressor.checkpoints.shapes import Language, Vision
    from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
    from rlrc.compressor.stages.sources import OfficialSource

    monkeypatch.setattr(checkpoint, "SMOLLM2", Language(64, 4, 15, 5, 64, 96))
    monkeypatch.setattr(checkpoint, "SMOLVLA_EXPERT", Language(48, 4, 15, 5, 64, 64))
    monkeypatch.setattr(checkpoint, "SMOLVLM_VISION", Vision(24, 2, 48, patch=16, tokens=64))
    monkeypatch.setattr(checkpoint, "SMOLVLM_VOCABULARY", 320)
    monkeypatch.setattr(checkpoint, "RESIZED", 128)
    checkpoint.write(tmp_path)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["vlm_model_name"] == str(tmp_path / "smolvlm")
    assert json.loads((tmp_path / "smolvlm" / "config.json").read_text())["text_config"]["hidden_size"] == 64
    source = OfficialSource(tmp_path / "checkpoint", Flags(tmp_path / "hints.json", tokenizer=tmp_path / "smolvlm"))
    policy = source.load()
    with np.load(tmp_path / "observation.npz") as stored:
        seen = {name: str(stored[name]) if name == "instruction" else stored[name] for name in stored.files}
    answer = TorchPolicy(policy.spec, source.tokenizer, lambda: policy).infer(seen)
    assert answer["actions"].shape == (50, 6)
    assert np.isfinite(answer["actions"]).all()


def test_transformers_modules_compute_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import decoder_speed
    from openvla_in_transformers import TransformersOpenVLA

    from rlrc import artifact as artifacts
    from rlrc.artifact import TOKENIZER, LayerSpec, TowerSpec
    from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
    from rlrc.compressor.stages import artifact_io as checkpoints
    from rlrc.runtime.inference.preprocess import Tokenizer

    towers = {
        "vision": TowerSpec(48, (LayerSpec(3, 3, 16, 96),) * 2, eps=1e-6),
        "decoder": TowerSpec(64, (LayerSpec(4, 2, 16, 96),) * 3),
    }
    monkeypatch.setattr(decoder_speed, "TOWERS", towers)
    spec = decoder_speed.spec()
    small = {**spec.geometry, "projector": [64, 64]}
    monkeypatch.setattr(decoder_speed, "spec", lambda: replace(spec, geometry=small))
    decoder_speed.make(tmp_path)
    artifact = artifacts.load(tmp_path / "dense")
    policy = checkpoints.load_policy(artifact).float()
    random = np.random.default_rng(0)
    seen = {"image.top": random.integers(0, 256, (256, 256, 3), np.uint8), "instruction": "w1 w2 w3 w4"}
    tokenizer = Tokenizer(artifact.file(TOKENIZER), artifact.manifest.policy.prompt)
    expected = TorchPolicy(artifact.manifest.policy, tokenizer, lambda: policy).infer(seen)["actions"]
    with torch.inference_mode():
        actions = TransformersOpenVLA(tmp_path / "dense", torch.float32).infer(seen)
    np.testing.assert_array_equal(actions, expected)
    assert len(np.unique(expected)) > 1


@pytest.mark.skipif("RLRC_LEROBOT_PYTHON" not in os.environ, reason="lerobot is not installed (docs/peers.md)")
@pytest.mark.slow
def test_lerobot_itself_agrees(race: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    sys.argv = ["race.py", "smolvla", str(out), "--only", "rlrc fp32,lerobot fp32", "--rounds", "2"]
    assert race.main() == 0
    row = next(row for row in results.read(out)["rows"] if row["name"] == "rlrc fp32")
    low, high = row["action_range"]
    assert row["action_difference"] < 1e-3 * (high - low)
