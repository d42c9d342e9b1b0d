"""Hidden-state distillation: its term by hand, who learns, which blocks belong together, real short runs, the stage."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlrc import artifact as artifacts
from rlrc.artifact import HistoryEntry
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.cli.compress import compress
from rlrc.compressor.models import precision
from rlrc.compressor.models.families import build
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.prune.prune import PruneConfig, prune
from rlrc.compressor.rl import simulation
from rlrc.compressor.rl.demonstrations import SampleBatches, Samples
from rlrc.compressor.rl.rollout import Rollouts
from rlrc.compressor.stages import sources
from rlrc.compressor.stages.artifact_io import inputs_of, load_policy
from rlrc.compressor.stages.distill import check_teacher, match_blocks, run_distill
from rlrc.compressor.stages.stage import StageOptions
from rlrc.compressor.training import sft as module
from rlrc.compressor.training.batches import Batch, TrainingData
from rlrc.compressor.training.distill import (
    CachedTeacher,
    Distillation,
    DistillConfig,
    LiveTeacher,
    build_objective,
    hidden_error,
    original_numbers,
    record_outputs,
)
from rlrc.compressor.training.losses import chunk_loss, draw_noise
from rlrc.compressor.training.run_state import RunState
from rlrc.compressor.training.sft import sft
from rlrc.errors import UserError

DATA = Path(__file__).parent / "data"
QUIET = StageOptions(evaluate=0, workers=1, threads=1)
BLOCKS = [f"decoder.layers.{i}" for i in range(4)]


@pytest.fixture
def batches(pupil: TinyPolicy) -> SampleBatches:
    """Of random samples: no simulator is needed to learn a teacher's answers."""
    random, rows = np.random.default_rng(0), 40
    samples = Samples(
        random.integers(0, 256, (rows, 32, 32, 3), np.uint8),
        random.uniform(0, 0.5, (rows, 7)).astype(np.float32),
        random.integers(0, 13, rows),
        random.uniform(-1, 1, (rows, 5, 4)).astype(np.float32),
    )
    return SampleBatches(samples, pupil.spec, random.integers(0, 10, (13, 6)), seed=0)


@pytest.fixture
def teacher(make_pupil: Callable[[], TinyPolicy]) -> TinyPolicy:
    """With residual branches that matter, as a trained policy has them."""
    policy = make_pupil()
    with torch.no_grad():
        for layer in policy.decoder.blocks():
            layer.attention.o.weight *= 20
            layer.mlp.down.weight *= 20
    return policy


def smaller(policy: TinyPolicy) -> TinyPolicy:
    config = PruneConfig(ratio=0.5, score="random")
    pruned = prune(copy.deepcopy(policy), config)[0].build()
    assert isinstance(pruned, TinyPolicy)
    return pruned


def objective(student: Any, teacher: Any, **settings: Any) -> Distillation:
    config = DistillConfig(**settings)
    return Distillation(student, BLOCKS, LiveTeacher(teacher, BLOCKS, config.smoothing), config)


def test_hidden_error_by_hand() -> None:
    """One block is off by 1 / 4. The other's positions by 4 / 5, by 9 / 9 in a second call, and by 1 of a million."""
    first = [torch.tensor([[[1.0]]])], [torch.tensor([[[2.0]]])]
    calls = torch.tensor([[[1.0, 0.0], [0.0, 999.0]]]), torch.tensor([[[0.0, 0.0]]])
    wanted = torch.tensor([[[1.0, 2.0], [0.0, 1000.0]]]), torch.tensor([[[3.0, 0.0]]])
    error = hidden_error([first[0], list(calls)], [first[1], list(wanted)])
    assert error.item() == pytest.approx((1 / 4 + (4 / 5 + 1e-6 + 1) / 3) / 2)


def test_the_loss_is_the_sum_of_its_parts(
    teacher: TinyPolicy, batches: SampleBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: bfloat16 products round otherwise on each class of processor, by up to 2e-4 of the loss."""
    monkeypatch.setattr(precision, "_chosen", {"cpu": "float32"})
    student, batch = smaller(teacher), batches.draw(4)
    metrics = objective(student, teacher, task=0.5, hidden=3.0)(batch)
    with torch.no_grad():
        task, error = chunk_loss(student, batch)
        states = []
        for policy in (student, teacher):
            with record_outputs(policy, BLOCKS) as found:
                chunk_loss(policy, batch)
            states.append([calls[0].float() for calls in found])
    assert len(states[0]) == 4
    expected = np.mean(
        [((a - b).square().sum(-1) / b.square().sum(-1)).mean().item() for a, b in zip(*states, strict=True)]
    )
    assert expected > 0.01
    assert metrics["hidden"].item() == pytest.approx(expected, rel=1e-4)
    assert metrics["loss"].item() == pytest.approx(0.5 * task.item() + 3 * expected, rel=1e-4)
    assert metrics["l1"].item() == pytest.approx(error.item())


def test_recorded_states_are_those_of_the_blocks(teacher: TinyPolicy, batches: SampleBatches) -> None:
    """The last block's, normalised, are what the head reads."""
    batch = batches.draw(2)
    assert batch.inputs.ids is not None
    assert batch.inputs.state is not None
    with torch.no_grad(), record_outputs(teacher, BLOCKS) as found:
        read = teacher.hidden(teacher.encode_image(batch.inputs.pixels[0]), batch.inputs.ids, batch.inputs.state)
    assert teacher.decoder.norm is not None
    torch.testing.assert_close(teacher.decoder.norm(found[-1][0])[:, -5:], read)
    assert all(not block._forward_hooks for block in teacher.decoder.layers)


FAMILIES = {
    "act": None,
    "openvla": "openvla/checkpoint",
    "openvla-oft-l1": "openvla/checkpoint",
    "smolvla": "smolvla/tiny_smolvlm",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_of_the_teacher_has_no_error_in_any_family(name: str) -> None:
    golden, tokenizer = DATA / name / "golden.json", FAMILIES[name]
    key = json.loads(golden.read_text())["observations"][0].get("unnorm_key")
    images = 2 if name == "openvla-oft-l1" else None
    flags = Flags(golden, key, None if tokenizer is None else DATA / tokenizer, images)
    source = sources.OfficialSource(DATA / name / "checkpoint", flags)
    policy, action = source.load(), source.spec.action
    inputs = inputs_of(source.spec, source.observations(), 0)
    batch = draw_noise(policy, Batch(inputs, torch.rand(1, action.horizon, action.dim) - 0.5))
    pairs = match_blocks(source, source)
    assert pairs
    assert all(ours == its for ours, its in pairs)
    assert {ours.split(".")[0] for ours, _ in pairs} == {"decoder", "expert", "encoder"} & set(source.towers)
    blocks = [ours for ours, _ in pairs]
    student = copy.deepcopy(policy)
    learn = Distillation(student, blocks, LiveTeacher(policy, blocks, 2.0), DistillConfig())
    metrics = learn(batch)
    assert metrics["hidden"].item() == 0
    assert metrics["loss"].item() > 0
    with torch.no_grad():
        student.get_parameter(f"{blocks[0]}.attention.o.weight").add_(0.1)
    assert learn(batch)["hidden"].item() > 0


def test_only_the_student_learns(teacher: TinyPolicy, batches: SampleBatches) -> None:
    student = smaller(teacher)
    learn = objective(student, teacher, task=0.0)
    assert {id(p) for p in learn.parameters()} == {id(p) for p in student.parameters()}
    learn(batches.draw(4))["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    grad = student.decoder.blocks()[2].mlp.down.weight.grad
    assert grad is not None
    assert grad.abs().max() > 0
    assert student.head.weight.grad is not None
    assert student.head.weight.grad.abs().max() == 0  # no block's output depends on it


def entry(dropped: dict[str, list[int]] | None = None) -> HistoryEntry:
    """A pruning's, as it reports the blocks that went; or another stage's."""
    after = {} if dropped is None else {"removed": {"dropped": dropped}}
    return HistoryEntry("prune", {}, "0.1.0", None, 0.0, after=after)


def test_numbers_of_blocks_by_hand() -> None:
    """Of eight blocks 2 and 5 go, then what are now the first and the last of the six: 0 and 7."""
    history = (entry(), entry({"decoder": [2, 5]}), entry({"decoder": [0, 5], "expert": [1]}))
    assert original_numbers(history, "decoder", 4) == [1, 3, 4, 6]
    assert original_numbers(history, "expert", 2) == [0, 2]
    assert original_numbers((), "decoder", 3) == [0, 1, 2]


def dropped(policy: TinyPolicy, gone: int) -> TinyPolicy:
    """Without one whole block."""
    tower, state = policy.towers["decoder"], dict[str, torch.Tensor]()
    for name, tensor in policy.state_dict().items():
        if not name.startswith("decoder.layers."):
            state[name] = tensor
        elif (number := int(name.split(".")[2])) != gone:
            state[name.replace(f".{number}.", f".{number - (number > gone)}.", 1)] = tensor
    kept = tower.layers[:gone] + tower.layers[gone + 1 :]
    student = build(policy.spec, policy.towers | {"decoder": replace(tower, layers=kept)})
    student.load_state_dict(state)
    assert isinstance(student, TinyPolicy)
    return student.eval()


def test_blocks_of_a_shallower_student_are_the_teacher_s(teacher: TinyPolicy, batches: SampleBatches) -> None:
    """A block that adds nothing to the residual stream is dropped: the others' outputs are the same."""
    with torch.no_grad():
        teacher.decoder.blocks()[1].attention.o.weight.zero_()
        teacher.decoder.blocks()[1].mlp.down.weight.zero_()
    student = dropped(teacher, 1)
    shallow = SimpleNamespace(towers=student.towers, history=(entry({"decoder": [1]}),))
    pairs = match_blocks(shallow, SimpleNamespace(towers=teacher.towers, history=()))
    assert [its for _, its in pairs] == ["decoder.layers.0", "decoder.layers.2", "decoder.layers.3"]
    assert [ours for ours, _ in pairs] == BLOCKS[:3]
    batch = batches.draw(3)
    errors = [
        Distillation(student, BLOCKS[:3], LiveTeacher(teacher, its, 2.0), DistillConfig())(batch)["hidden"].item()
        for its in ([its for _, its in pairs], BLOCKS[:3])
    ]
    assert errors[0] < 1e-6
    assert errors[1] > 1e-2


def run_in(folder: Path, config: DistillConfig) -> RunState:
    run = RunState(folder)
    run.open("distill", "parent", config)
    run.start_clock(None)
    return run


def train(student: Any, teacher: Any, config: DistillConfig, batches: SampleBatches, run: RunState, **kw: Any) -> None:
    """As the stage does it."""
    batches = SampleBatches(batches.samples, batches.spec, batches.ids.numpy(), config.seed)
    pairs = [(block, block) for block in BLOCKS]
    learn = build_objective(config, teacher, pairs, batches, run.folder)
    sft(student, config, TrainingData(batches), run, kw.get("progress", lambda step, text: None), None, learn)


def curve(run: RunState) -> list[dict[str, Any]]:
    """Rows without what a clock measured."""
    rows = [json.loads(line) for line in run.curve_file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "cpu_seconds"} for row in rows]


@pytest.mark.parametrize("cache", [False, True])
def test_short_run_lowers_the_hidden_term(
    teacher: TinyPolicy, batches: SampleBatches, tmp_path: Path, cache: bool
) -> None:
    config = DistillConfig(steps=100, batch=16, rate=3e-3, warmup=5, task=0.1, state_noise=0.0, cache=cache)
    run = run_in(tmp_path / "run", config)
    train(smaller(teacher), teacher, config, batches, run)
    first, second = curve(run)
    assert first["stage"] == "distill"
    assert second["hidden"] < 0.6 * first["hidden"]
    assert {"loss", "hidden", "l1"} < second.keys()


@pytest.mark.parametrize("cache", [False, True])
def test_killed_and_resumed_run_is_the_uninterrupted_one(
    teacher: TinyPolicy,
    batches: SampleBatches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_short: Callable[..., None],
    cache: bool,
) -> None:
    monkeypatch.setattr(module, "LOG_EVERY", 5)
    config = DistillConfig(steps=20, batch=4, warmup=5, state_noise=0.0 if cache else 0.01, cache=cache)
    student = smaller(teacher)
    straight, resumed = (copy.deepcopy(student) for _ in range(2))
    train(straight, teacher, config, batches, run_in(tmp_path / "whole", config))

    def begun(progress: Callable[[int, str], None]) -> None:
        cut = copy.deepcopy(student)
        train(cut, teacher, config, batches, run_in(tmp_path / "cut", config), progress=progress)

    cut_short(begun, saved=10, killed=15)
    shown: list[int] = []
    run = run_in(tmp_path / "cut", config)
    train(resumed, teacher, config, batches, run, progress=lambda step, text: shown.append(step))
    assert shown == list(range(10, 21))
    assert curve(run) == curve(RunState(tmp_path / "whole"))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_cache_asks_the_teacher_once_for_every_row(teacher: TinyPolicy, batches: SampleBatches, tmp_path: Path) -> None:
    asked: list[int] = []

    class Counting(LiveTeacher):
        def __call__(self, batch: Batch) -> Any:
            asked.append(len(batch))
            return super().__call__(batch)

    live = LiveTeacher(teacher, BLOCKS, 2.0)
    kept = CachedTeacher(Counting(teacher, BLOCKS, 2.0), tmp_path, len(batches))

    def batch(*rows: int) -> Batch:
        return replace(batches.rows(np.array(rows)), rows=torch.tensor(rows))

    kept(batch(3, 1, 3))
    found = kept(batch(1, 7, 3, 0))
    assert asked == [1, 3, 2]  # one for the shapes
    for (ours,), (its,) in zip(found, live(batch(1, 7, 3, 0)), strict=True):
        # Half precision is exact to 2 ** -11; rows are computed in other batches.
        torch.testing.assert_close(ours.float(), its.float(), rtol=2e-3, atol=2e-2)
    again = CachedTeacher(Counting(teacher, BLOCKS, 2.0), tmp_path, len(batches))(batch(7, 0))
    assert asked == [1, 3, 2, 1]  # what another process kept
    assert all(torch.equal(ours[0], its[0][[1, 3]]) for ours, its in zip(again, found, strict=True))
    kept(batches.rows(np.array([5, 6])))  # held out: these are no rows of the training set
    assert asked[-1] == 2
    longer = batch(9)
    assert longer.inputs.ids is not None
    longer.inputs.ids = torch.cat([longer.inputs.ids] * 2, 1)
    with pytest.raises(
        UserError, match=r"expected hidden states of 16 positions .* found 22: prompts .* leave the cache out"
    ):
        kept(longer)


def test_cache_is_refused_where_samples_change(teacher: TinyPolicy, batches: SampleBatches, tmp_path: Path) -> None:
    class Augmented(SampleBatches):
        def draw(self, size: int) -> Batch:
            return replace(super().draw(size), rows=None)

    config = DistillConfig(cache=True, state_noise=0.0)
    changing = Augmented(batches.samples, batches.spec, batches.ids.numpy(), 0)
    with pytest.raises(UserError, match=r"expected samples that never change .* found augmented data"):
        build_objective(config, teacher, [("decoder.layers.0",) * 2], changing, tmp_path)
    before = batches.state()
    build_objective(config, teacher, [("decoder.layers.0",) * 2], batches, tmp_path)
    assert batches.state() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 0.0}, r"expected distill\.hidden > 0, found 0\.0"),
        ({"task": -1.0}, r"expected distill\.task >= 0, found -1\.0"),
        ({"cache": True}, r"expected distill\.state_noise 0 with distill\.cache, found 0\.01"),
        ({"cache": True, "dagger_rounds": 2}, r"expected distill\.dagger_rounds 0 with distill\.cache, found 2"),
        ({"steps": 0}, r"expected distill\.steps >= 1, found 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        DistillConfig(**wrong)
    assert "\n" not in str(error.value)


def test_teachers_that_do_not_fit_are_refused(pupil_artifact: Path, tiny_artifact: Path) -> None:
    student, other = (sources.open_source(path, Flags()) for path in (pupil_artifact, tiny_artifact))
    config = DistillConfig(teacher="TEACHER")
    check_teacher(student, student, config)
    with pytest.raises(
        UserError, match=r"expected a teacher with the student's state, 7, found 3 in TEACHER; give the"
    ):
        check_teacher(student, other, config)
    source = sources.OfficialSource(DATA / "act/checkpoint", Flags())
    with pytest.raises(UserError, match="expected a teacher of the family tiny, found act in TEACHER"):
        check_teacher(student, source, config)
    shallow = copy.copy(student)
    shallow.towers = student.towers | {
        "decoder": replace(student.towers["decoder"], layers=student.towers["decoder"].layers[:3])
    }
    with pytest.raises(UserError, match=r"expected a teacher with the blocks \[0, 1, 2, 3\] .* found \[0, 1, 2\]"):
        check_teacher(student, shallow, config)
    coarse = copy.copy(student)
    coarse.spec = replace(student.spec, action=replace(student.spec.action, bins=8))
    with pytest.raises(
        UserError, match=r"the student's numbers of a chunk, \(5, 4, 16\), found \(5, 4, 8\) in TEACHER"
    ):
        check_teacher(student, coarse, config)
    wide = copy.copy(student)
    wide.towers = student.towers | {"decoder": replace(student.towers["decoder"], width=96)}
    with pytest.raises(UserError, match=r"expected a teacher with the student's decoder width, 64, found 96"):
        check_teacher(student, wide, config)


def test_a_teacher_of_fixed_flow_steps_is_refused() -> None:
    flags = Flags(DATA / "pi05/golden.json", tokenizer=DATA / "pi05/tokenizer")
    student = sources.OfficialSource(DATA / "pi05/checkpoint", flags)
    config, cut = DistillConfig(teacher="TEACHER"), copy.copy(student)
    cut.towers = student.towers | {"expert": replace(student.towers["expert"], norm="steps")}
    check_teacher(cut, student, config)
    with pytest.raises(UserError, match=r"expected a teacher that answers at every time .* found TEACHER, cut to its"):
        check_teacher(student, cut, config)
    with pytest.raises(UserError, match=r"expected a policy without flow steps for distill\.cache"):
        check_teacher(student, student, DistillConfig(cache=True, state_noise=0.0))


def test_the_stage_and_the_recipe_s_own_teacher(
    pupil_artifact: Path, rollouts: Rollouts, demos: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As part of a recipe it learns from what the recipe starts from; alone it must be told."""
    monkeypatch.setattr(simulation, "Rollouts", lambda *_: nullcontext(rollouts))
    monkeypatch.setattr("rlrc.exporters.export.export", lambda artifact, out: None)
    config = DistillConfig(steps=50, batch=8, warmup=5, demonstrations=1)
    recipe = {"prune": PruneConfig(ratio=0.5, score="random"), "distill": config}
    for _ in range(2):  # the second time everything is there
        compress(pupil_artifact, tmp_path / "out", recipe, QUIET)
    made = artifacts.load(tmp_path / "out.stages" / "distill")
    last = made.manifest.history[-1]
    assert (last.stage, last.config["teacher"]) == ("distill", str(pupil_artifact))
    assert last.after["teacher"] == artifacts.load(pupil_artifact).digest
    (row,) = (json.loads(line) for line in made.file("curves/2-distill.jsonl").read_text().splitlines())
    assert row["hidden"] > 0
    assert load_policy(made).towers["decoder"].layers[1].heads == 2
    with pytest.raises(UserError, match="expected a teacher for distill, found none; give --teacher"):
        run_distill(pupil_artifact, tmp_path / "alone", config, QUIET)
