"""A data set as a policy sees it, its inspection, and demonstrations that become one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from families import DATA as DATA_FOLDER
from families import source_of
from rlrc.artifact import ActionSpec, CameraSpec, Manifest, NormStats, PolicySpec
from rlrc.datasets.fit import MatchedDataset, match, split
from rlrc.datasets.inspection import check_fit, describe
from rlrc.datasets.lerobot import Dataset
from rlrc.datasets.meta import Feature
from rlrc.datasets.writer import Recording, write
from rlrc.errors import UserError
from rlrc.runtime import cli
from rlrc.runtime.inference.preprocess import check, prepare

SIZE = 32
CAMERA, WRIST, STATE, ACTION = "observation.images.corner4", "observation.images.wrist", "observation.state", "action"
LENGTHS = (6, 2, 5, 4)


def features(**others: Feature | None) -> dict[str, Feature]:
    """What fits the policy of conftest; others replace or (None) remove."""
    found: dict[str, Feature | None] = {
        CAMERA: Feature("image", (SIZE, SIZE, 3)),
        STATE: Feature("float32", (3,), ("x", "y", "grip")),
        ACTION: Feature("float32", (4,)),
    }
    found |= {name.replace("__", "."): feature for name, feature in others.items()}
    return {name: feature for name, feature in found.items() if feature is not None}


def value(feature: Feature, number: int) -> np.ndarray:
    dtype = np.uint8 if feature.camera else np.dtype(feature.dtype)
    return np.full(feature.shape, number, dtype)


def record(
    path: Path, own: dict[str, Feature] | None = None, lengths: Sequence[int] = LENGTHS, fps: float = 10
) -> Path:
    """Every value of frame i of episode e is 10 e + i; all differ between dimensions only where a test changes them."""
    own = own or features()

    def frames(episode: int, length: int) -> Iterator[dict[str, Any]]:
        for i in range(length):
            yield {name: value(feature, 10 * episode + i) for name, feature in own.items()}

    write(
        path,
        fps,
        own,
        (Recording(("open", "close")[e % 2] + " the drawer", frames(e, n)) for e, n in enumerate(lengths)),
    )
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("datasets") / "set")


@pytest.fixture(scope="session")
def spec(tiny_manifest: Manifest) -> PolicySpec:
    return tiny_manifest.policy


def widened(spec: PolicySpec, horizon: int) -> PolicySpec:
    return replace(spec, action=replace(spec.action, horizon=horizon))


def test_samples_are_observations_and_what_follows(folder: Path, spec: PolicySpec) -> None:
    """Frames 4 and 5 end episode 0, 6 begins episode 1; in the order asked for, one of them twice."""
    matched = match(Dataset.open(folder), spec)
    assert (len(matched), matched.cameras, matched.state) == (17, {"corner4": CAMERA}, (STATE,))
    samples = matched.samples([6, 4, 5, 6])
    for sample, number, chunk, real in zip(
        samples, (10, 4, 5, 10), ([10, 11, 11], [4, 5, 5], [5, 5, 5], [10, 11, 11]), (2, 2, 1, 2), strict=True
    ):
        observation = sample.observation
        assert set(observation) == {"image.corner4", "state", "instruction"}
        assert (observation["image.corner4"] == number).all()
        np.testing.assert_array_equal(observation["state"], np.array([number] * 3, np.float32))
        assert observation["instruction"] == ("close the drawer" if number == 10 else "open the drawer")
        np.testing.assert_array_equal(sample.chunk, np.repeat(np.array(chunk, np.float32)[:, None], 4, 1))
        np.testing.assert_array_equal(sample.real, np.arange(3) < real)
        check(observation, spec)
        assert prepare(observation, spec, None).pixels[0].shape == (SIZE, SIZE, 3)


def test_a_horizon_longer_than_any_episode_is_padded(folder: Path, spec: PolicySpec) -> None:
    (sample,) = match(Dataset.open(folder), widened(spec, 50)).samples(np.array([0]))
    assert (sample.chunk.shape, sample.real.sum()) == ((50, 4), 6)
    assert (sample.chunk[6:] == 5).all()


def test_a_policy_without_state_and_prompt_gets_neither(folder: Path, spec: PolicySpec) -> None:
    (sample,) = match(Dataset.open(folder), replace(spec, state=None, prompt=None)).samples([0])
    assert set(sample.observation) == {"image.corner4"}


def test_cameras_by_another_name(folder: Path, spec: PolicySpec) -> None:
    other = replace(spec, cameras=(replace(spec.cameras[0], name="image0"),))
    dataset = Dataset.open(folder)
    for name in ("corner4", CAMERA):
        assert match(dataset, other, {"image0": name}).cameras == {"image0": CAMERA}
    assert match(dataset, other, {"observation.images.image0": "corner4"}).cameras == {"image0": CAMERA}
    with pytest.raises(UserError, match=r"camera image0 in .*, found corner4; map them with --cameras image0 NAME$"):
        match(dataset, other)
    with pytest.raises(UserError, match=r"expected the policy's camera image0 as top in .*, found corner4"):
        match(dataset, other, {"image0": "top"})
    with pytest.raises(UserError, match=r"expected the policy's camera image0 in .*, found corner4"):
        match(dataset, other, {"image0": "none"})  # it needs this one
    with pytest.raises(UserError, match=r"expected cameras of the policy \(image0\) to be mapped, found image1"):
        match(dataset, other, {"image1": "corner4"})


def several(spec: PolicySpec, *names: str) -> PolicySpec:
    """A policy of these cameras, all of which may be missing, as pi0's and SmolVLA's may."""
    return replace(spec, cameras=tuple(replace(spec.cameras[0], name=name, optional=True) for name in names))


def test_optional_cameras_are_left_out_only_if_that_is_asked_for(folder: Path, spec: PolicySpec) -> None:
    dataset = Dataset.open(folder)
    two = several(spec, "wrist", "corner4")
    with pytest.raises(
        UserError,
        match=r"the policy's camera wrist in .*, found corner4; .* --cameras wrist NAME, or --cameras wrist none",
    ):
        match(dataset, two)
    matched = match(dataset, two, {"wrist": "none"})
    assert matched.cameras == {"corner4": CAMERA}
    assert set(matched.samples([0])[0].observation) == {"image.corner4", "state", "instruction"}
    with pytest.raises(UserError, match=r"expected the policy's cameras left, right as hand in .*, found corner4"):
        match(dataset, several(spec, "left", "corner4", "right"), {"right": "hand"})
    with pytest.raises(UserError, match=r"expected one of the cameras wrist in .*, found corner4"):
        match(dataset, several(spec, "wrist"), {"wrist": "none"})


def test_lerobots_empty_cameras_are_meant_to_be_missing(folder: Path, spec: PolicySpec) -> None:
    matched = match(Dataset.open(folder), several(spec, "corner4", "empty_camera_0", "empty_camera_1"))
    assert matched.cameras == {"corner4": CAMERA}


def test_two_cameras_of_a_policy_are_not_the_same_one(folder: Path, tmp_path: Path, spec: PolicySpec) -> None:
    with pytest.raises(UserError, match=f"found {CAMERA} for wrist and corner4; correct --cameras POLICY DATASET"):
        match(Dataset.open(folder), several(spec, "wrist", "corner4"), {"wrist": "corner4"})
    dataset = Dataset.open(
        record(tmp_path / "set", features(**{WRIST.replace(".", "__"): Feature("image", (SIZE, SIZE, 3))}))
    )
    with pytest.raises(UserError, match=f"found {WRIST} for left and right"):
        match(dataset, several(spec, "left", "right"), {"left": "wrist", "right": WRIST})
    swapped = match(dataset, several(spec, "wrist", "corner4"), {"wrist": "corner4", "corner4": "wrist"})
    assert swapped.cameras == {"wrist": CAMERA, "corner4": WRIST}


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("observation__state", ("y", "x", "grip"), "state (x, y, grip) in .*, found y, x, grip; write"),
        ("observation__state", ("grip", "a", "b"), "state (x, y, grip) in .*, found grip, a, b; write"),
        ("action", ("gripper", "dx", "dy", "dz"), "action (dx, dy, dz, gripper) in .*, found gripper, dx, dy, dz"),
    ],
)
def test_dimensions_in_another_order_are_refused(
    tmp_path: Path, spec: PolicySpec, name: str, names: tuple[str, ...], found: str
) -> None:
    dataset = Dataset.open(record(tmp_path / "set", features(**{name: Feature("float32", (len(names),), names)})))
    pattern = found.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=f"in the order of the policy's {pattern}"):
        match(dataset, spec)


def test_dimensions_of_other_names_are_noted(tmp_path: Path, spec: PolicySpec) -> None:
    """Whether they are the same is for a person to judge; names that only count say nothing."""
    own = features(observation__state=Feature("float32", (3,), ("x", "y", "hand")))
    own[WRIST] = Feature("image", (SIZE, SIZE, 3))
    dataset = Dataset.open(record(tmp_path / "set", own))
    found = check_fit(dataset, spec, {})
    assert found["fits"]
    assert found["notes"] == [
        "the policy's state (x, y, grip) is taken in this order from observation.state (x, y, hand)",
        f"{WRIST} is not used: the policy does not take it",
    ]
    assert spec.state is not None
    counted = replace(spec, state=replace(spec.state, names=("joint_0", "joint_1", "joint_2")))
    assert [note for note in check_fit(dataset, counted, {})["notes"] if "order" in note] == []
    own = features(observation__state=Feature("float32", (3,), ("joint_1", "joint_2", "joint_3")))
    assert check_fit(Dataset.open(record(tmp_path / "counted", own)), counted, {})["fits"]
    blind = check_fit(dataset, replace(spec, state=None), {})
    assert (blind["state"], f"{STATE} is not used: the policy does not take it" in blind["notes"]) == ([], True)


def test_pictures_of_another_size_where_the_policy_resizes(tmp_path: Path, spec: PolicySpec) -> None:
    own = features(**{CAMERA.replace(".", "__"): Feature("image", (24, 40, 3))})
    dataset = Dataset.open(record(tmp_path / "set", own))
    with pytest.raises(UserError, match=r"observation.images.corner4 of .* expected .* 32 x 32 .* found 24 x 40"):
        match(dataset, spec)
    camera: CameraSpec = replace(spec.cameras[0], resize="bilinear")
    (sample,) = match(dataset, replace(spec, cameras=(camera,))).samples([0])
    assert sample.observation["image.corner4"].shape == (24, 40, 3)


def test_the_state_of_the_environment_follows_the_robots(tmp_path: Path, spec: PolicySpec) -> None:
    own = features(observation__state=Feature("float32", (2,)), observation__environment_state=Feature("float32", (1,)))
    matched = match(Dataset.open(record(tmp_path / "set", own)), spec)
    assert matched.state == (STATE, "observation.environment_state")
    np.testing.assert_array_equal(matched.samples([7])[0].observation["state"], np.array([11] * 3, np.float32))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"observation__state": Feature("float32", (2,), ("x", "y"))},
            r"expected observation.state of shape \(3,\) in .* state \(x, y, grip\), found float32 \(2,\): x, y;",
        ),
        ({"observation__state": None}, r"expected observation.state of shape \(3,\) in .*, found none"),
        (
            {"action": Feature("float32", (7,))},
            r"expected action of shape \(4,\) in .* \(dx, dy, dz, gripper\), found float32 \(7,\); choose",
        ),
        ({"action": None}, r"expected action of shape \(4,\) in .*, found none"),
        ({CAMERA.replace(".", "__"): None}, "expected the policy's camera corner4 in .*, found none"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, spec: PolicySpec, others: dict[str, Any], message: str
) -> None:
    dataset = Dataset.open(record(tmp_path / "set", features(**others)))
    with pytest.raises(UserError, match=message) as error:
        match(dataset, spec)
    assert "\n" not in str(error.value)


def edit(path: Path, relative: str, name: str, values: Any) -> None:
    table = pq.read_table(path / relative)
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, pa.array(values, table.schema.field(name).type)), path / relative)


DATA = "data/chunk-000/file-000.parquet"


def test_a_policy_with_a_prompt_needs_tasks_in_words(tmp_path: Path, spec: PolicySpec) -> None:
    edit(record(tmp_path / "set"), "meta/tasks.parquet", "task", ["open the drawer", ""])
    dataset = Dataset.open(tmp_path / "set")
    with pytest.raises(UserError, match=r"expected a task for .* found none for task_index 1"):
        match(dataset, spec)
    assert match(dataset, replace(spec, prompt=None))


def test_broken_numbers_are_refused(tmp_path: Path, spec: PolicySpec) -> None:
    states = np.zeros((17, 3))
    states[7, 1], states[9, 0] = np.nan, np.inf
    edit(record(tmp_path / "set"), DATA, STATE, states.tolist())
    with pytest.raises(UserError, match="found nan or inf in 2 frames, first in frame 1 of episode 1; remove"):
        match(Dataset.open(tmp_path / "set"), spec)


def test_episodes_are_split_whole(folder: Path) -> None:
    dataset = Dataset.open(folder)
    episode = dataset.column("episode_index")
    drawn = set()
    for seed in range(20):
        train, held = split(dataset, 0.5, seed)
        np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(17))
        assert not set(episode[train]) & set(episode[held])
        assert len(set(episode[held])) == 2
        drawn.add(tuple(held))
        for one, again in zip((train, held), split(dataset, 0.5, seed), strict=True):
            np.testing.assert_array_equal(one, again)
    assert len(drawn) > 3
    assert [len(part) for part in split(dataset, 0, 0)] == [17, 0]
    assert len(set(episode[split(dataset, 0.01, 0)[1]])) == 1  # at least one
    assert len(set(episode[split(dataset, 0.99, 0)[0]])) == 1
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="expected a held-out share"):
            split(dataset, share, 0)


def test_one_episode_cannot_be_split(tmp_path: Path) -> None:
    dataset = Dataset.open(record(tmp_path / "set", lengths=(3,)))
    with pytest.raises(UserError, match=r"expected at least two episodes .* found 1; hold out 0"):
        split(dataset, 0.5, 0)
    assert len(split(dataset, 0.0, 0)[0]) == 3


def test_what_a_data_set_holds(folder: Path) -> None:
    found = describe(Dataset.open(folder))
    assert (found["version"], found["fps"], found["episodes"], found["frames"]) == ("v3.0", 10, 4, 17)
    assert found["seconds"] == pytest.approx(1.7)
    assert found["tasks"] == {
        "open the drawer": {"episodes": 2, "frames": 11},
        "close the drawer": {"episodes": 2, "frames": 6},
    }
    assert found["features"][STATE] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "grip"]}
    numbers = [10 * e + i for e, n in enumerate(LENGTHS) for i in range(n)]
    assert found["statistics"][ACTION]["mean"] == pytest.approx([np.mean(numbers)] * 4)
    assert found["statistics"][ACTION]["std"] == pytest.approx([np.std(numbers)] * 4)
    assert found["bytes"] > 4000
    assert found["warnings"] == []


def test_what_looks_wrong_is_told(tmp_path: Path) -> None:
    path = record(tmp_path / "set", lengths=(200, 3))
    random = np.random.default_rng(0)
    states, actions = random.normal(size=(203, 3)), random.normal(size=(203, 4))
    states[:, 0], states[5, 1], actions[17, 2] = 0.25, np.nan, 1000.0
    edit(path, DATA, STATE, states.tolist())
    edit(path, DATA, ACTION, actions.tolist())
    stamps = np.concatenate([np.arange(200) / 10 + 0.02, [0, 0.2, 0.1]])
    edit(path, DATA, "timestamp", stamps)
    dataset = Dataset.open(path)
    assert describe(dataset)["warnings"] == [
        "observation.state dimension 0 (x): constant, always 0.25",
        "observation.state dimension 1 (y): nan or inf in 1 frames",
        "action dimension 2: 1 values beyond 10 standard deviations, such as 1000",
        "time stamps do not grow in 1 episodes, the first is 1",
        "time stamps are off 10 a second in 1 episodes, the first is 0",
    ]
    assert describe(dataset)["statistics"][STATE]["max"][1] == pytest.approx(np.nanmax(np.float32(states[:, 1])))


DEPTH = "observation.depth"


def with_depth(path: Path, shape: tuple[int, int] = (48, 64)) -> Path:
    """A data set with a tensor a frame, as lerobot stores it: 0, 1, 2, ... tenths of the frame's number."""
    record(path)
    rows, size = sum(LENGTHS), shape[0] * shape[1]
    values = np.arange(rows)[:, None] + np.linspace(0, 0.1, size)
    values[3, 5] = np.nan
    column = pa.FixedSizeListArray.from_arrays(
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32(), from_pandas=False), shape[1]), shape[0]
    )
    pq.write_table(pq.read_table(path / DATA).append_column(DEPTH, column), path / DATA, row_group_size=5)
    info = json.loads((path / "meta/info.json").read_text())
    info["features"][DEPTH] = {"dtype": "float32", "shape": list(shape), "names": ["height", "width"]}
    (path / "meta/info.json").write_text(json.dumps(info))
    return path


def test_large_features_are_described_by_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlrc.datasets.columns._BATCH", 100_000)  # four frames at a time
    path = with_depth(tmp_path / "set")
    dataset = Dataset.open(path)
    found = describe(dataset)
    values = dataset.column(DEPTH)[np.isfinite(dataset.column(DEPTH))].astype(np.float64)
    expected = {"min": [values.min()], "max": [values.max()], "mean": [values.mean()], "std": [values.std()]}
    for kind, numbers in expected.items():
        assert found["statistics"][DEPTH][kind] == pytest.approx(numbers, rel=1e-6)
    assert f"{DEPTH}: nan or inf in 1 frames" in found["warnings"]
    code, out, _ = command(capsys, "inspect", path)
    (line,) = [line for line in out.splitlines() if DEPTH in line and "│" in line]
    assert (code, [cell.strip() for cell in line.split("│")[1:-1]]) == (
        0,
        [DEPTH, "float32", "48 x 64", "all 3,072", "0", "16.1", "8.05", "4.899"],
    )
    assert len(out.splitlines()) < 40


def test_a_long_vector_is_described_by_one_line(tmp_path: Path) -> None:
    dataset = Dataset.open(record(tmp_path / "set", features(observation__audio=Feature("int16", (4000,)))))
    assert describe(dataset)["statistics"]["observation.audio"]["max"] == [33.0]


def test_tables_of_inspect_are_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is no terminal here, so 80 columns are nobody's."""
    long = "observation." + "a_very_long_name_" * 6
    path = record(tmp_path / "set", features(**{long.replace(".", "__"): Feature("float32", (2,), ("left", "b" * 90))}))
    edit(path, "meta/tasks.parquet", "task", ["put " + "the red cube into the blue box and " * 5, "close it"])
    code, out, _ = command(capsys, "inspect", path)
    assert (code, "…" in out) == (0, False)
    for text in (long, "b" * 90, "put " + "the red cube into the blue box and " * 5):
        assert any(text in line for line in out.splitlines())


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_says_whether_a_policy_fits(
    folder: Path, toy_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "inspect", folder, "--policy", toy_artifact)
    assert (code, err) == (0, "")
    assert "fits the policy: cameras corner4 = observation.images.corner4; state observation.state; chunks of 3" in out
    code, out, err = command(capsys, "inspect", folder, "--json")
    assert (code, json.loads(out)["frames"]) == (0, 17)
    assert "policy" not in json.loads(out)
    narrow = record(tmp_path / "narrow", features(action=Feature("float32", (2,))))
    code, out, err = command(capsys, "inspect", narrow, "--policy", toy_artifact, "--json")
    assert (code, json.loads(out)["policy"]["fits"], err.count("\n")) == (1, False, 1)
    assert "expected action of shape (4,)" in err
    code, out, err = command(capsys, "inspect", narrow, "--policy", toy_artifact, "--cameras", "corner4", "top")
    assert (code, err.count("\n")) == (1, 2)  # everything that does not fit is said
    assert "expected the policy's camera corner4 as top in" in err
    assert "expected action of shape (4,)" in err


def test_inspect_and_training_refuse_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pi0 of two cameras, of which one may be missing at run time, and a data set that names one otherwise."""
    checkpoint = Path(shutil.copytree(DATA_FOLDER / "pi0/checkpoint", tmp_path / "pi0"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["input_features"]["observation.images.wrist"] = config["input_features"]["observation.images.top"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    named = ["--hints", DATA_FOLDER / "pi0/golden.json", "--tokenizer", DATA_FOLDER / "pi0/tokenizer"]
    spec = source_of("pi0").spec
    assert spec.state is not None
    own = {f"observation.images.{name}": Feature("image", (SIZE, SIZE, 3)) for name in ("top", "hand")}
    own |= {STATE: Feature("float32", (len(spec.state.names),)), ACTION: Feature("float32", (spec.action.dim,))}
    path = record(tmp_path / "set", own)
    said = f"expected the policy's camera wrist in {path}, found top, hand; map them with --cameras wrist NAME, or"
    code, out, err = command(capsys, "inspect", path, "--policy", checkpoint, *named)
    assert (code, "fits the policy" in out, said in err) == (1, False, True)
    arguments = ["sft", checkpoint, tmp_path / "out", "--data", path, "--steps", "1", *named]
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert (said in captured.err, captured.err.count("\n"), (tmp_path / "out").exists()) == (True, 1, False)
    for other, told in (
        ("hand", "top, wrist = observation.images.hand; state"),
        ("none", "top (without wrist); state"),
    ):
        code, out, err = command(capsys, "inspect", path, "--policy", checkpoint, *named, "--cameras", "wrist", other)
        assert (code, err, told in out) == (0, "", True)


def test_inspect_of_an_official_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Path(__file__).parent / "data/act/checkpoint"
    code, _, err = command(capsys, "inspect", folder, "--policy", checkpoint)
    assert code == 1
    assert "expected the policy's camera top in" in err


def test_inspect_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "inspect", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, err = command(capsys)
    assert (code, "data inspect" in out, "data demonstrations" in out) == (0, True, True)
    code, out, err = command(capsys, "inspects")
    assert (code, "did you mean data inspect?" in err) == (2, True)


def test_reading_never_imports_torch(folder: Path) -> None:
    program = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "from rlrc.runtime import cli; cli.main(['data', 'inspect', sys.argv[1], '--json'])\n"
        "print({'torch', 'lerobot', 'pandas', 'datasets'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1] == "set()", ended.stderr


def test_demonstrations_become_a_data_set(
    own_cache: Path,
    tmp_path: Path,
    spec: PolicySpec,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replaying the first episode's actions in its scene gives its states and pictures; the second one is disturbed."""
    from rlrc.compressor.rl.expert_dataset import play
    from rlrc.envs.experts import expert
    from rlrc.envs.metaworld import ACTION_NAMES, make

    arguments = ["demonstrations", tmp_path / "set", "--episodes-per-task", "2", "--tasks", "faucet-close-v3"]
    code, out, _ = command(capsys, *arguments, "--size", str(SIZE))
    assert code == 0
    assert "2 episodes, 2 successful" in out
    dataset = Dataset.open(tmp_path / "set")
    assert (dataset.fps, dataset.info.robot_type, len(dataset.episodes)) == (20, "sawyer", 2)
    assert dataset.features[ACTION].names == ACTION_NAMES

    env = make("faucet-close-v3", SIZE)
    observation, _ = env.reset(seed=0)
    for i in range(len(dataset.episodes[0])):  # the first episode is played without noise
        frame = dataset.frame(i)
        np.testing.assert_array_equal(frame.pictures[CAMERA], observation[f"image.{CAMERA.split('.')[-1]}"])
        np.testing.assert_array_equal(frame.state, observation["state"])
        assert (frame.task, env.success) == ("close the faucet", False)
        observation, *_ = env.step(frame.action)
    assert env.success

    # The hand does not move as the recorded action says, which is the expert's own.
    noisy = [frame for i in range(len(dataset)) if (frame := dataset.frame(i)).episode == 1]
    assert all(np.abs(frame.action).max() <= 1 for frame in noisy)
    env.reset(seed=1)
    np.testing.assert_array_equal(expert(env.task)(env.full_observation), noisy[0].action)
    env.advance(noisy[0].action)
    assert np.abs(env.state() - noisy[1].state).max() > 1e-5
    played, executed = make("faucet-close-v3", SIZE), list[np.ndarray]()
    advance = played.advance
    monkeypatch.setattr(played, "advance", lambda action: executed.append(np.array(action)) or advance(action))
    again = list(play(played, 1))
    np.testing.assert_array_equal([frame.state for frame in noisy], [frame[STATE] for frame in again])
    noise = np.stack(executed) - np.stack([frame[ACTION] for frame in again])
    assert (noise[:, :3] != 0).all()
    assert (noise[:, 3] == 0).all()  # the gripper executes the expert's own action

    fitting = replace(
        spec,
        state=replace(spec.state, names=dataset.features[STATE].names, norm=NormStats((0.0,) * 7, (1.0,) * 7)),
        action=ActionSpec(5, ACTION_NAMES, spec.action.meaning, spec.action.units, spec.action.norm, 32),
    )
    matched: MatchedDataset = match(dataset, fitting)
    sample = matched.samples([0])[0]
    np.testing.assert_array_equal(sample.chunk, dataset.column(ACTION)[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "juggle"), "expected a task out of"),
        (("--episodes-per-task", "0"), "expected at least one episode a task"),
        (("--size", "0"), "expected at least one episode a task and a size of at least 1"),
        (("--size", "33", "--video"), "expected an even height and width"),
    ],
)
def test_demonstrations_that_cannot_be_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "demonstrations", tmp_path / "set", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []
