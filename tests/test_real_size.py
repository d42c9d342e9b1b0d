"""The study of real sizes with tiny ones: its folders are official ones, its rows say what a command took."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import measured
import numpy as np
import official_folder
import pytest
import real_size
import small_dataset
import torch
from measured import Kill, Usage
from real_size import Plan, Step, Study
from safetensors import safe_open

from rlrc import artifact as artifacts
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.checkpoints import geometry, reader
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.prune.config import PruneConfig
from rlrc.compressor.stages.prune import run_prune
from rlrc.compressor.stages.stage import StageOptions
from rlrc.datasets.fit import match
from rlrc.datasets.lerobot import Dataset
from rlrc.errors import UserError
from rlrc.npz import read_npz
from rlrc.runtime.cli import main as rlrc

OPTIONS = {
    "openvla-7b": ReadOptions(unnorm_key="bridge_orig"),
    "openvla-oft-7b": ReadOptions(images=2),
    "pi0": ReadOptions(),
    "pi05": ReadOptions(),
    "smolvla-450m": ReadOptions(),
}


@pytest.fixture(scope="module")
def smolvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvla") / "folder"
    official_folder.write_folder("smolvla-450m", folder, tiny=True)
    return folder


@pytest.mark.parametrize("policy", official_folder.POLICIES)
def test_the_folder_is_read_as_an_official_one(policy: str, tmp_path: Path) -> None:
    real_size.main(["folder", policy, str(tmp_path / "folder"), "--tiny"])
    folder = open_folder(tmp_path / "folder")
    layout = reader.layout(folder, OPTIONS[policy])
    reader.check(folder, layout, reader.build(layout))
    described = reader.layout(*official_folder.describe(policy, tiny=True))
    seen = replace(layout.spec, cameras=described.spec.cameras)  # whose means OpenVLA's folder has in bfloat16
    assert (seen, layout.towers) == (described.spec, described.towers)
    assert [(one.name, one.height) for one in layout.spec.cameras] == [(c.name, c.height) for c in seen.cameras]
    for file in (tmp_path / "folder").glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert all(opened.get_slice(name).get_dtype() == "BF16" for name in opened.keys())  # noqa: SIM118


@pytest.mark.parametrize("policy", official_folder.POLICIES)
def test_real_folders_have_the_official_dimensions(policy: str) -> None:
    layout = reader.layout(*official_folder.describe(policy))
    official = reader.layout(*geometry.folder(policy))
    assert layout.towers == official.towers
    assert layout.spec.geometry == official.spec.geometry


def test_shards_are_those_of_the_official_openvla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """openvla/openvla-7b has three: two of just under 7 GB and one of 1.16 GB. All sizes here are divided by 10^6."""
    tensors = official_folder.random_weights(official_folder.describe("openvla-7b")[0].tensors)
    sizes: dict[str, int] = {}

    def write(path: Path, tensors: Tensors, names: list[str], *_: object) -> None:
        sizes[path.name] = sum(tensors.meta(name).nbytes for name in names)

    monkeypatch.setattr(official_folder, "write_file", write)
    official_folder.write_shards(tmp_path, tensors, official_folder.SHARD)
    assert {name: round(size / 1e9, 2) for name, size in sizes.items()} == {
        "model-00001-of-00003.safetensors": 6.95,
        "model-00002-of-00003.safetensors": 6.97,
        "model-00003-of-00003.safetensors": 1.16,
    }
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == 15_082_474_368
    assert len(index["weight_map"]) == 982


def test_matrices_preserve_the_scale_of_inputs_and_their_rows_differ() -> None:
    shape = (300, 40_000)  # made in two pieces
    weights = official_folder.make_tensor("model.layers.0.mlp.up_proj.weight", shape, torch.float32)
    outputs = weights @ torch.randn(40_000, generator=torch.Generator().manual_seed(1))
    assert 0.8 < float(outputs.square().mean().sqrt()) < 1.2
    magnitudes = weights.norm(dim=1).sort().values
    assert float(magnitudes[-1] / magnitudes[0]) > 3
    again = official_folder.make_tensor("model.layers.1.mlp.up_proj.weight", shape, torch.float32)
    assert not torch.equal(weights, again)


def test_norms_are_near_one() -> None:
    for name, center in (
        ("language_model.model.norm.weight", 1.0),
        ("model.paligemma_with_expert.paligemma.model.language_model.norm.weight", 0.0),  # Gemma's is 1 + weight
        ("model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.weight", 1.0),
        ("vision_backbone.featurizer.norm.bias", 0.0),
    ):
        values = official_folder.make_tensor(name, (1000,), torch.float32)
        assert abs(float(values.mean()) - center) < 0.02
        assert 0.08 < float(values.std()) < 0.12


def test_openvla_answers_with_action_tokens_that_rounding_does_not_exchange() -> None:
    """A blank is followed by the token in the middle of the action tokens, and each of them by the next one."""
    embedding, head = (
        official_folder.make_tensor(name, (32064, 128), torch.float32)
        for name in (official_folder.LLAMA_EMBEDDING, official_folder.LLAMA_HEAD)
    )
    blocks = 3 * torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    for token, following in ((29871, 31872), (31872, 31873), (31990, 31991), (31999, 31744)):
        hidden = embedding[token] + blocks
        logits = hidden / hidden.square().mean(1, keepdim=True).sqrt() @ head.T
        first, second = logits.topk(2).values.T
        assert logits.argmax(1).tolist() == [following] * 4
        assert float((first - second).min()) > 1


def test_the_tokenizer_has_a_piece_for_every_row_of_the_embedding(smolvla: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smolvla / "tokenizer.json"))
    rows = official_folder.TINY["SMOLVLM_VOCABULARY"]
    assert tokenizer.get_vocab_size() == rows
    ids = tokenizer.encode("pick up the red block").ids
    assert ids
    assert max(ids) < rows


def test_prune_runs_on_the_folder(smolvla: Path, tmp_path: Path) -> None:
    before = reader.layout(open_folder(smolvla), ReadOptions()).towers["decoder"].layers
    run_prune(smolvla, tmp_path / "out", PruneConfig(ratio=0.5, score="magnitude"), StageOptions(evaluate=0), Flags())
    after = artifacts.load(tmp_path / "out").manifest.towers["decoder"].layers
    assert [layer.mlp for layer in after] == [before[0].mlp, *(before[i].mlp // 2 for i in (1, 2)), before[3].mlp]


def test_inspect_accepts_the_folder(smolvla: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlrc(["inspect", str(smolvla)]) == 0
    assert "8,112,992 in 124 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("policy", official_folder.POLICIES)
def test_the_data_set_fits_the_policy(policy: str, tmp_path: Path) -> None:
    spec = real_size.spec_of(policy, tiny=True)
    small_dataset.write_dataset(spec, tmp_path / "data", frames=5)
    matched = match(Dataset.open(tmp_path / "data"), spec)
    assert len(matched) == 5
    (sample,) = matched.samples([4])
    assert np.isfinite(sample.chunk).all()
    assert np.abs((sample.chunk - spec.action.norm.center) / spec.action.norm.scale).max() <= 1
    small_dataset.write_observation(spec, tmp_path / "observation.npz")
    assert read_npz(tmp_path / "observation.npz").keys() == sample.observation.keys()


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected one of the policies openvla-7b, .* found 'rt-2'"):
        official_folder.write_folder("rt-2", tmp_path / "x")


# What a command took


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_memory_times_and_bytes_of_a_process_and_its_child(tmp_path: Path) -> None:
    """150 MB in the command, 100 MB at the same time in its child, which also burns 0.3 s; 20 MB to the disk."""
    child = "import time; x = b'x' * 100_000_000; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass\n"
    code = f"""
import os, subprocess, sys, time
x = b'x' * 150_000_000
with open({str(tmp_path / "written")!r}, 'wb') as file:
    file.write(x[:20_000_000]); os.fsync(file.fileno())
subprocess.run([sys.executable, '-c', {child + "time.sleep(0.3)"!r}], check=True)
sys.exit(3)
"""
    usage = measured.measure(python(code), tmp_path / "log")
    assert usage.exit_code == 3
    assert 250e6 < usage.anonymous < 320e6
    assert usage.resident >= usage.anonymous
    assert 0 < usage.file < usage.resident
    assert usage.cpu_s > 0.3
    assert usage.wall_s > 0.6
    assert usage.written in (0, pytest.approx(20e6, rel=0.5))  # memory file systems count nothing
    assert not usage.killed


def test_mapped_files_are_resident_and_not_anonymous(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(100_000_000))
    code = f"""
import mmap, time
with open({str(file)!r}, 'rb') as opened:
    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    sum(mapped[i] for i in range(0, len(mapped), 4096)); time.sleep(0.3)
"""
    usage = measured.measure(python(code), tmp_path / "log")
    assert usage.file > 100e6
    assert usage.resident > 100e6
    assert usage.anonymous < 50e6


@pytest.mark.parametrize("name", ["KILL", "INT"])
def test_a_command_is_interrupted_when_it_says_so_and_a_file_is_there(
    name: Literal["KILL", "INT"], tmp_path: Path
) -> None:
    code = f"""
import pathlib, time
pathlib.Path({str(tmp_path / "a1")!r}).touch(); print('step 3', flush=True); time.sleep(60)
"""
    kill = Kill(0.2, str(tmp_path / "a*"), "step [1-9]", name)
    usage = measured.measure(python(code), tmp_path / "log", kill=kill)
    assert usage.killed
    assert usage.exit_code == -getattr(signal, f"SIG{name}")
    assert 0.2 < usage.wall_s < 30


def test_text_of_an_earlier_run_does_not_interrupt(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("step 3\n")
    usage = measured.measure(python("import time; time.sleep(0.3)"), tmp_path / "log", kill=Kill(says="step 3"))
    assert (usage.killed, usage.exit_code) == (False, 0)


def test_usage_of_a_command_that_went_on() -> None:
    first, second = Usage(-9, 5, 20, 8, 100, 1.5, 2.0, True), Usage(0, 7, 10, 1, 10, 0.5, 1.0)
    assert first + second == Usage(0, 7, 20, 8, 110, 2.0, 3.0)


# The steps

PROGRAM = """
import pathlib, sys, time
what, out = sys.argv[1:3]
out = pathlib.Path(out)
if what == "refuse":
    sys.exit(f"rlrc: error: expected more, found less in {out}")
if what == "slow":
    state = out.with_name("state"); runs = len(state.read_text()) if state.exists() else 0
    state.write_text("x" * (runs + 1)); print(f"step {runs}", flush=True)
    time.sleep(60 if runs < 2 else 0)
values = b"x" * 60_000_000 if what == "large" else b""
time.sleep(0.15)
(out / "weights").mkdir(parents=True)
(out / "weights/model.safetensors").write_bytes(b"other" if what == "other" else b"same")
"""


def study(tmp_path: Path, *steps: Step) -> Study:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes(2_000_000))
    plan = Plan({"pi0": ("--flag", "x")}, steps)
    results = tmp_path / "results.json"
    return Study("pi0", plan, folder, tmp_path / "data", tmp_path / "work", results, (sys.executable, str(program)))


def rows(tmp_path: Path) -> dict[str, dict[str, object]]:
    return {row["step"]: row for row in json.loads((tmp_path / "results.json").read_bytes())["rows"]}


def test_steps_run_once_and_rows_are_replaced(tmp_path: Path) -> None:
    first = Step("prune", ("write", "{out}", "{folder}", "{flags}"), "pruned", anonymous_gb=1.0)
    second = Step("quantize", ("write", "{out}", "{prune}"), "int4")
    chain = study(tmp_path, first, second, Step("gguf", ("write", "{out}"), "gguf", only=("openvla-7b",)))
    assert real_size.run_study(chain)
    found = rows(tmp_path)
    assert list(found) == ["prune", "quantize"]
    assert found["prune"]["command"] == "rlrc write pruned folder --flag x"
    assert found["prune"]["limits"] == {"anonymous_gb": 1.0}
    assert found["prune"]["verdict"] == "PASS"
    tight = replace(first, anonymous_gb=0.001)
    assert real_size.run_study(study(tmp_path, tight, second))
    assert rows(tmp_path) == found
    assert not real_size.run_study(study(tmp_path, tight, second), ["prune"], again=True)
    again = rows(tmp_path)
    assert list(again) == ["prune", "quantize"]
    assert again["prune"]["verdict"] == "FAIL"
    assert again["quantize"] == found["quantize"]
    log = (tmp_path / "work/log.txt").read_text()
    assert "pi0 prune: there already" in log
    assert "is more than 0.001" in log


def test_limits_that_are_exceeded(tmp_path: Path) -> None:
    step = Step("large", ("large", "{out}"), "large", 0.06, 0.0001, resident_to_weights=1.6)
    assert not real_size.run_study(study(tmp_path, step))
    reasons = rows(tmp_path)["large"]["reasons"]
    assert isinstance(reasons, list)
    assert [reason.split()[0] for reason in reasons] == ["anonymous_gb", "cpu_minutes", "resident"]


def test_a_command_that_fails_and_the_steps_behind_it(tmp_path: Path) -> None:
    chain = study(
        tmp_path, Step("prune", ("refuse", "{out}"), "pruned"), Step("sft", ("write", "{out}", "{prune}"), "sft")
    )
    assert not real_size.run_study(chain)
    assert list(rows(tmp_path)) == ["prune"]
    assert rows(tmp_path)["prune"]["reasons"] == ["exit code 1: rlrc: error: expected more, found less in pruned"]
    assert "sft: left out, without the output of prune" in (tmp_path / "work/log.txt").read_text()


def test_an_interrupted_step_must_end_with_the_same_weights(tmp_path: Path) -> None:
    kills = (Kill(says="step 0", signal="INT"), Kill(says="step 1"))
    once = Step("once", ("write", "{out}"), "once")
    killed = Step("killed", ("slow", "{out}"), "killed", kills=kills, same_weights_as="once", must_say="step 2")
    assert real_size.run_study(study(tmp_path, once, killed))
    assert rows(tmp_path)["killed"]["interruptions"] == 2
    (tmp_path / "work/once/weights/model.safetensors").write_bytes(b"changed")
    (tmp_path / "work/state").unlink()
    assert not real_size.run_study(study(tmp_path, once, killed), ["killed"], again=True)
    assert rows(tmp_path)["killed"]["reasons"] == ["other weights than once"]


def test_a_step_that_ends_before_it_is_interrupted(tmp_path: Path) -> None:
    step = Step("quick", ("write", "{out}"), "quick", kills=(Kill(says="step 9"),), must_say="step")
    assert not real_size.run_study(study(tmp_path, step))
    assert rows(tmp_path)["quick"]["reasons"] == ["interrupted 0 times instead of 1", "it never said 'step'"]


def test_unknown_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected steps of prune, found export; name others with --only"):
        real_size.run_study(study(tmp_path, Step("prune", ("write", "{out}"))), ["export"])


def test_the_plan_is_whole() -> None:
    """Every step names outputs that exist, and knows the flags of its policies."""
    plan = real_size.read_toml(Plan, real_size.PLAN)
    assert plan.flags.keys() == set(official_folder.POLICIES)
    for policy in plan.flags:
        chain = Study(policy, plan, Path("folder"), Path("data"), Path("/nowhere"))
        for step in chain.steps:
            assert "{" not in " ".join(chain.arguments(step))
            assert not {one for one in chain.missing(step) if one not in [other.name for other in chain.steps]}
    openvla = [step.name for step in plan.steps]
    assert len(openvla) == len(set(openvla))
