"""Robot profiles: what is read, what is refused, and those that come with rlrc."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from guarded import ABSOLUTE, DELTA, GRIPPER, SOURCES, VELOCITY, action_of

from rlrc import artifact as artifacts
from rlrc.errors import UserError
from rlrc.runtime.safety import profile as profiles
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.profile import Dimension, Limit, Position, RobotProfile, Tracking, Workspace

TEXT = """
robot = "one joint"
[sources]
sheet = "data sheet, page 3"
[[dimensions]]
name = "joint"
meaning = "absolute"
unit = "rad"
state = "q"
position = { low = -1.0, high = 1, source = "sheet" }
velocity = { limit = 2.0, source = "sheet", on = "hold" }
acceleration = { limit = 3.0, source = "sheet" }
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "robot.toml"
    path.write_text(text)
    return path


def test_reads_a_file(tmp_path: Path) -> None:
    profile = profiles.load(write(tmp_path, TEXT))
    assert profile.robot == "one joint"
    assert profile.dimensions == (
        Dimension(
            "joint",
            "absolute",
            "rad",
            Position(-1.0, 1.0, "sheet", "clamp", 0.0),
            Limit(2.0, "sheet", "hold"),
            Limit(3.0, "sheet", "clamp"),
            state="q",
        ),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "joint"', 'name = "joint"\nspeed = 3', r"found dimensions\[0\]\.speed, which is unknown"),
        ('meaning = "absolute"', 'meaning = "torque"', r"expected one of 'absolute', .* at dimensions\[0\].meaning"),
        (', source = "sheet", on = "hold"', "", r"expected the key dimensions\[0\].velocity.source, found none"),
        ("high = 1,", "high = nan,", "a finite number at dimensions"),
        ('"hold"', '"warn"', "expected one of 'clamp', 'hold', 'stop'"),
        ("data sheet, page 3", " ", "expected words at every entry of sources, found none at sheet"),
        ("low = -1.0", 'low = 1.0, on = "stop"', "expected low < high at position of joint"),
        ("limit = 3.0", "limit = 0.0", "expected positive limits of joint"),
        ('limit = 3.0, source = "sheet"', 'limit = 3.0, source = "x"', "one of the sources sheet of joint, found 'x'"),
        ('state = "q"', "", "expected the state that measures joint, which has position limits, found none"),
        ("robot =", "robot", "expected TOML in .*robot.toml"),
    ],
)
def test_refuses_a_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(UserError, match=message) as caught:
        profiles.load(write(tmp_path, TEXT.replace(old, new)))
    assert "robot.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_a_file_that_is_not_there() -> None:
    message = r"a robot profile at pandda .*one of aloha, .*, found: No such file or directory; correct it or give"
    with pytest.raises(UserError, match=message):
        profiles.load("pandda")


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (replace(ABSOLUTE, velocity=None), "expected a velocity limit of x, found none"),
        (replace(ABSOLUTE, acceleration=None), "expected an acceleration limit of x, found none"),
        (replace(ABSOLUTE, position=None), "expected position limits of x, found none"),
        (replace(ABSOLUTE, position=None, unbounded="s"), "expected position limits of x"),
        (replace(ABSOLUTE, base="measured"), "expected a base of deltas only, not of x"),
        (replace(ABSOLUTE, rest=0.0), "expected a rest of grippers only"),
        (replace(ABSOLUTE, position=replace(ABSOLUTE.position, slack=-1.0)), "a slack of 0 or more"),
        (replace(DELTA, position=None), "either position limits or unbounded of x"),
        (replace(DELTA, unbounded="s"), "either position limits or unbounded of x"),
        (replace(DELTA, state=None), "expected the state that measures x"),
        (replace(DELTA, position=None, unbounded="s", state=None, base="measured"), "expected the state"),
        (replace(DELTA, base="measured", tracking=Tracking(1.0, "s")), "expected no tracking of x"),
        (replace(VELOCITY, unit="m"), "expected a unit per second of x, found m"),
        (replace(VELOCITY, tracking=Tracking(1.0, "s")), "expected no tracking of x"),
        (replace(GRIPPER, position=None), "expected position limits of grip"),
        (replace(GRIPPER, rest=None), "expected either state or rest of grip"),
        (replace(GRIPPER, state="at"), "expected either state or rest of grip"),
        (replace(GRIPPER, rest=2.0), "expected a rest of grip within its position limits, found 2"),
        (replace(GRIPPER, acceleration=Limit(1.0, "s")), "a velocity limit with the acceleration limit of grip"),
    ],
)
def test_refuses_a_dimension_with_a_gap(dimension: Dimension, message: str) -> None:
    with pytest.raises(UserError, match=message):
        profiles.check(RobotProfile("r", SOURCES, (dimension,)))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Workspace(("x",), (0.0, 1.0), (1.0, 2.0), "s"), "dimensions, low and high of one length"),
        (Workspace(("x", "x"), (0.0, 0.0), (1.0, 1.0), "s"), "every dimension of the workspace once"),
        (Workspace(("x",), (1.0,), (1.0,), "s"), "low < high at workspace"),
        (Workspace(("grip",), (0.0,), (1.0,), "s"), "some of x as the workspace's dimensions, found grip"),
        (Workspace(("x",), (0.0,), (1.0,), "t"), "one of the sources s of the workspace"),
    ],
)
def test_refuses_a_workspace(box: Workspace, message: str) -> None:
    with pytest.raises(UserError, match=message):
        profiles.check(RobotProfile("r", SOURCES, (ABSOLUTE, GRIPPER), box))


def test_refuses_a_dimension_twice_and_none() -> None:
    for dimensions in ((), (ABSOLUTE, ABSOLUTE)):
        with pytest.raises(UserError, match="at least one dimension, and every one once"):
            profiles.check(RobotProfile("r", SOURCES, dimensions))


def test_a_box_may_stand_for_position_limits() -> None:
    box = Workspace(("x",), (0.0,), (1.0,), "s")
    profile = RobotProfile("r", SOURCES, (replace(DELTA, position=None), GRIPPER), box)
    profiles.check(profile)
    assert (profile.box(0), profile.box(1)) == ((0.0, 1.0), None)


PROFILE = RobotProfile("r", SOURCES, (ABSOLUTE, GRIPPER))
ACTION = action_of(PROFILE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"names": ("x", "y", "grip")},
            "of the policy's dimensions x, y, grip, in that order, found x, grip",
        ),
        ({"names": ("grip", "x")}, "found x, grip; rename, add or reorder the dimensions of 'r'"),
        ({"names": ("x", "gripper")}, "expected a profile of the policy's dimensions x, gripper"),
        ({"meaning": ("delta", "gripper")}, "expected x as delta in m, as the policy gives, found absolute in m"),
        ({"units": ("cm", "1")}, "expected x as absolute in cm, as the policy gives, found absolute in m"),
    ],
)
def test_refuses_a_policy_it_does_not_cover(changed: dict, message: str) -> None:
    if len(changed.get("names", ())) == 3:
        changed |= {"meaning": ("absolute", "absolute", "gripper"), "units": ("m", "m", "1")}
    with pytest.raises(UserError, match=message):
        Guard(PROFILE, 10, replace(ACTION, **changed), ["at_x"], ["m"])


@pytest.mark.parametrize(
    ("names", "units", "message"),
    [
        (["x"], ["m"], "expected the state of x among x, found at_x"),
        (["at_x"], ["rad"], "expected the state at_x in m or what converts into it, found rad"),
        (["at_x"], ["1"], "expected the state at_x in m"),
    ],
)
def test_refuses_a_state_that_does_not_measure(names: list[str], units: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Guard(PROFILE, 10, ACTION, names, units)


def test_units_convert() -> None:
    dimensions = (replace(ABSOLUTE, unit="cm"), replace(VELOCITY, name="turn", unit="rad/s", state="angle"))
    profile = RobotProfile("r", SOURCES, dimensions)
    senses = profiles.match_state(profile, action_of(profile), ["angle", "at_x"], ["deg", "mm"])
    assert senses.dimensions == (0, 1)
    assert senses.entries == (1, 0)
    np.testing.assert_allclose(senses.factors, (0.1, math.pi / 180))


@pytest.mark.parametrize("name", profiles.list_shipped())
def test_shipped_profiles_make_guards(name: str) -> None:
    profile = profiles.load(name)
    sensed = [dimension for dimension in profile.dimensions if dimension.state is not None]
    names, units = [str(d.state) for d in sensed], [d.length for d in sensed]
    guard = Guard(profile, 20, action_of(profile), names, units)
    low, high = guard.limits.low, guard.limits.high
    middle = np.array([(low[i] + high[i]) / 2 for i, d in enumerate(profile.dimensions) if d.state is not None])
    guard.start(middle)
    verdict = guard.hold(middle, 0.05)
    assert verdict.command is not None
    assert not verdict.stopped
    assert set(profile.sources) == {
        limit.source
        for d in profile.dimensions
        for limit in (d.position, d.velocity, d.acceleration, d.tracking, d.jump, d.lead, d.still)
        if limit is not None
    } | {d.unbounded for d in profile.dimensions if d.unbounded} | (
        {profile.workspace.source} if profile.workspace else set()
    )


def test_numbers_of_shipped_profiles() -> None:
    """Spot checks against the data sheets, read once more."""
    panda = profiles.load("franka-panda").dimensions
    assert [d.acceleration.limit for d in panda if d.acceleration] == [15, 7.5, 10, 12.5, 15, 20, 20]
    assert panda[3].position is not None
    assert (panda[3].position.low, panda[3].position.high) == (-3.0718, -0.0698)
    aloha = profiles.load("aloha").dimensions
    assert aloha[8].name == "right_joint_1"
    assert aloha[8].position is not None
    assert math.degrees(aloha[8].position.high) == pytest.approx(72, abs=1e-3)
    so101 = profiles.load("so-101").dimensions
    assert so101[0].position is not None
    assert so101[0].position.high == round(math.degrees(1.91986), 1)


def test_the_simulators_profile_covers_the_reference_policy() -> None:
    spec = artifacts.load(Path(__file__).parent.parent / "reference/dense", verify=()).manifest.policy
    assert spec.state is not None
    guard = Guard(profiles.load("metaworld"), 20, spec.action, spec.state.names, spec.state.units)
    state = np.array([0.1, 0.6, 0.2, 1.0, 0, 0, 0], np.float32)
    guard.start(state)
    # Whatever the simulator itself takes goes through: from one end to the other in a step.
    for command in ([1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, 1]):
        sent = guard.step(np.array(command, np.float32), state, 0.05).command
        np.testing.assert_array_equal(sent, command)
    assert len(guard.events) == 1


def test_the_guide_lists_every_profile() -> None:
    guide = (Path(__file__).parent.parent / "docs/robots.md").read_text()
    assert [name for name in profiles.list_shipped() if f"`{name}`" not in guide] == []


def test_the_guides_example_is_a_profile(tmp_path: Path) -> None:
    guide = (Path(__file__).parent.parent / "docs/robots.md").read_text()
    lines = guide[guide.index("    robot = ") : guide.index("| key of a dimension")].splitlines()
    text = "\n".join(lines).replace('dimensions = ["x", "y", "z"]', 'dimensions = ["joint_0"]')
    text = text.replace("[0.2, -0.3, 0.02]", "[0.2]").replace("[0.6, 0.3, 0.5]", "[0.6]")
    assert [d.name for d in profiles.load(write(tmp_path, text)).dimensions] == ["joint_0", "gripper"]
