"""A robot's limits as a TOML file, for the guard (guard.py). docs/robots.md explains how to write one.

Every dimension of the action has its own entry: its meaning and unit as in the artifact's manifest, its limits, each
with its source and with what happens when a command breaks it, and the entry of the observed state that measures it.
No default loosens a limit: a missing entry is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import ActionSpec
from rlrc.errors import UserError
from rlrc.strict import check_distinct, read_toml

SHIPPED = Path(__file__).parent / "profiles"
REMEDY = "correct the profile (docs/robots.md)"

On = Literal["clamp", "hold", "stop"]  # the mildest first
Meaning = Literal["absolute", "delta", "velocity", "gripper"]

TURNS = {"rad": 2 * math.pi, "deg": 360.0}  # a whole turn
WHOLE = 0.99  # position limits that span this share of a turn count as a whole turn: 3.14 for pi
# Sizes in a base unit. Units of one table convert into each other, all other units only into themselves.
_SCALES = ({"m": 1.0, "cm": 0.01, "mm": 0.001}, {"rad": 1.0, "deg": math.pi / 180})


@dataclass(frozen=True)
class Position:
    """``low`` to ``high`` in the dimension's unit. The robot may be measured up to ``slack`` outside."""

    low: float
    high: float
    source: str
    on: On = "clamp"
    slack: float = 0.0


@dataclass(frozen=True)
class Limit:
    """At most ``limit`` in size: a velocity in units per second, an acceleration in units per second squared."""

    limit: float
    source: str
    on: On = "clamp"


@dataclass(frozen=True)
class Tracking:
    """How far the measured position may be from the commanded one (collision, broken cable, robot switched off).

    As ``jump``: how much further from the previous measurement than the velocity limit explains. As ``lead``: how far
    the commands may run ahead before the robot moves at all. As ``still``: the same, while the state does not change at
    all (rlrc.runtime.safety.plausibility).
    """

    limit: float
    source: str
    on: Literal["hold", "stop"] = "stop"


@dataclass(frozen=True)
class Dimension:
    """One dimension of the action; ``name``, ``meaning`` and ``unit`` are the manifest's. Sources name an entry there.

    The unit of a velocity ends in "/s"; its position limits are in the unit without that. ``state``: the entry of the
    observed state that measures the position, in the same unit or one that converts into it. ``base``: what the robot
    adds a delta to, its last command or where it is. ``rest``: the command of a gripper without ``state`` until
    the policy gives one. ``unbounded``: the source that says why a delta or velocity has no position limits.
    ``periodic``: an angle that is the same after a whole turn.
    """

    name: str
    meaning: Meaning
    unit: str
    position: Position | None = None
    velocity: Limit | None = None
    acceleration: Limit | None = None
    tracking: Tracking | None = None
    state: str | None = None
    base: Literal["command", "measured"] = "command"
    rest: float | None = None
    unbounded: str | None = None
    jump: Tracking | None = None
    lead: Tracking | None = None
    still: Tracking | None = None
    periodic: bool = False

    @property
    def period(self) -> float:
        """A whole turn in the unit of its position, inf if it is not periodic."""
        return TURNS.get(self.length, math.inf) if self.periodic else math.inf

    @property
    def turns(self) -> bool:
        """Whether it is periodic and may take every angle; its position limits only fix the range of its numbers."""
        limit = self.position
        return self.periodic and (limit is None or limit.high - limit.low >= WHOLE * self.period)

    @property
    def length(self) -> str:
        """The unit of its position."""
        return self.unit.removesuffix("/s") if self.meaning == "velocity" else self.unit

    @property
    def measured(self) -> bool:
        """Whether its position is the measured one, instead of where the commands lead."""
        return self.state is not None and (self.meaning == "velocity" or self.base == "measured")


@dataclass(frozen=True)
class Workspace:
    """A box for Cartesian dimensions, within their own position limits or instead of them."""

    dimensions: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    source: str
    on: On = "stop"
    slack: float = 0.0


@dataclass(frozen=True)
class RobotProfile:
    """``sources``: name -> where the numbers come from; every limit names one of them."""

    robot: str
    sources: dict[str, str]
    dimensions: tuple[Dimension, ...]
    workspace: Workspace | None = None

    def box(self, index: int) -> tuple[float, float] | None:
        """The workspace's limits of a dimension, None if it has none."""
        name, box = self.dimensions[index].name, self.workspace
        if box is None or name not in box.dimensions:
            return None
        axis = box.dimensions.index(name)
        return box.low[axis], box.high[axis]


class StateMatch(NamedTuple):
    """The measured dimensions, the entries of the state that measure them, and factors from the entries' units."""

    dimensions: tuple[int, ...]
    entries: tuple[int, ...]
    factors: tuple[float, ...]


def list_shipped() -> list[str]:
    """The names of the profiles that come with rlrc."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load(profile: str | Path) -> RobotProfile:
    """A shipped profile by its name, or a TOML file. Raises UserError if it is missing, invalid or inconsistent."""
    path = SHIPPED / f"{profile}.toml" if str(profile) in list_shipped() else Path(profile)
    expected = f"a robot profile at {path} (a TOML file, or one of {', '.join(list_shipped())})"
    found = read_toml(RobotProfile, path, expected, "correct it or give another (docs/robots.md)")
    try:
        check(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found


def check(profile: RobotProfile) -> None:
    """Checks what the types cannot express. Raises UserError."""
    names = [dimension.name for dimension in profile.dimensions]
    _check(0 < len(set(names)) == len(names), "at least one dimension, and every one once", names)
    empty = [name for name, text in profile.sources.items() if not text.strip()]
    _check(not empty, "words at every entry of sources", f"none at {', '.join(empty)}")
    wires = {dimension.name: dimension.state for dimension in profile.dimensions if dimension.state is not None}
    check_distinct(wires, "entry of the state", "dimensions", "the profile (docs/robots.md)")
    if profile.workspace is not None:
        _check_workspace(profile.workspace, profile)
    for index, dimension in enumerate(profile.dimensions):
        _check_dimension(dimension, profile.box(index))
        limits = (
            dimension.position,
            dimension.velocity,
            dimension.acceleration,
            dimension.tracking,
            dimension.jump,
            dimension.lead,
            dimension.still,
        )
        sources = [dimension.unbounded, *(limit.source for limit in limits if limit is not None)]
        for source in sources:
            if source is not None:
                _check_source(source, f"of {dimension.name}", profile)


def _check_workspace(box: Workspace, profile: RobotProfile) -> None:
    lengths = [len(box.dimensions), len(box.low), len(box.high)]
    _check(len(set(lengths)) == 1 and lengths[0] > 0, "dimensions, low and high of one length at workspace", lengths)
    _check(len(set(box.dimensions)) == lengths[0], "every dimension of the workspace once", list(box.dimensions))
    fits = all(low < high for low, high in zip(box.low, box.high, strict=True))
    _check(fits, "low < high at workspace", (box.low, box.high))
    _check(box.slack >= 0, "a slack of 0 or more at workspace", box.slack)
    moving = [dimension.name for dimension in profile.dimensions if dimension.meaning != "gripper"]
    strange = [name for name in box.dimensions if name not in moving]
    _check(not strange, f"some of {', '.join(moving)} as the workspace's dimensions", ", ".join(strange))
    _check_source(box.source, "of the workspace", profile)


def _check_dimension(dimension: Dimension, box: tuple[float, float] | None) -> None:
    name, meaning, position = dimension.name, dimension.meaning, dimension.position
    moves = meaning in ("delta", "velocity")
    if position is not None:
        _check(position.low < position.high, f"low < high at position of {name}", (position.low, position.high))
        _check(position.slack >= 0, f"a slack of 0 or more at position of {name}", position.slack)
    plausible = {"jump": dimension.jump, "lead": dimension.lead, "still": dimension.still}
    for limit in (dimension.velocity, dimension.acceleration, dimension.tracking, *plausible.values()):
        _check(limit is None or limit.limit > 0, f"positive limits of {name}", limit)
    bounded = position is not None or box is not None
    if meaning == "gripper":
        _check(position is not None, f"position limits of {name}", None)
        fits = dimension.velocity is not None or dimension.acceleration is None
        _check(fits, f"a velocity limit with the acceleration limit of {name}", None)
        has_one, rest = [dimension.state, dimension.rest].count(None) == 1, dimension.rest
        _check(has_one, f"either state or rest of {name}", f"state {dimension.state} and rest {rest}")
        if position is not None and rest is not None:
            _check(position.low <= rest <= position.high, f"a rest of {name} within its position limits", rest)
    else:
        _check(dimension.velocity is not None, f"a velocity limit of {name}", None)
        _check(dimension.acceleration is not None, f"an acceleration limit of {name}", None)
        _check(dimension.rest is None, f"a rest of grippers only, not of {name}", dimension.rest)
        _check(bounded or moves, f"position limits of {name}", None)
        _check(bounded != (dimension.unbounded is not None), f"either position limits or unbounded of {name}", None)
        _check(
            dimension.state is not None or not bounded,
            f"the state that measures {name}, which has position limits",
            None,
        )
    _check(dimension.unbounded is None or moves, f"unbounded of deltas and velocities only, not of {name}", meaning)
    _check(dimension.base == "command" or meaning == "delta", f"a base of deltas only, not of {name}", meaning)
    _check(dimension.base == "command" or dimension.state is not None, f"the state that measures {name}", None)
    _check(meaning != "velocity" or dimension.unit.endswith("/s"), f"a unit per second of {name}", dimension.unit)
    tracked = dimension.state is not None and not dimension.measured
    _check(dimension.tracking is None or tracked, f"no tracking of {name}, whose commands are not followed", "one")
    limited = dimension.state is not None and dimension.velocity is not None
    for key, limit in plausible.items():
        _check(limit is None or limited, f"a state and a velocity limit with the {key} of {name}", None)
    if dimension.periodic:
        _check_periodic(dimension, box)


def _check_periodic(dimension: Dimension, box: tuple[float, float] | None) -> None:
    name, position, period = dimension.name, dimension.position, dimension.period
    _check(dimension.unit in TURNS, f"a periodic {name} in {' or '.join(TURNS)}", dimension.unit)
    _check(
        dimension.meaning in ("absolute", "delta"), f"absolutes and deltas as periodic, not {name}", dimension.meaning
    )
    _check(dimension.state is not None, f"the state that measures the periodic {name}", None)
    _check(box is None, f"no workspace limits of the periodic {name}", box)
    if position is not None:
        fits = (position.high - position.low) * WHOLE <= period
        _check(fits, f"position limits of the periodic {name} within a turn", (position.low, position.high))


def _check_source(source: str, where: str, profile: RobotProfile) -> None:
    _check(source in profile.sources, f"one of the sources {', '.join(profile.sources)} {where}", repr(source))


def periods(profile: RobotProfile) -> NDArray[np.float64] | None:
    """(D,): the periods of absolute commands, inf for those that do not wrap and for deltas; None: none wraps."""
    found = np.array([d.period if d.meaning == "absolute" else math.inf for d in profile.dimensions])
    return None if np.isinf(found).all() else found


def match_state(profile: RobotProfile, action: ActionSpec, names: Sequence[str], units: Sequence[str]) -> StateMatch:
    """Checks a profile against a policy's actions and the robot's state (``names`` and ``units`` of its entries).

    Raises UserError if a dimension is missing, or differs in name, position, meaning or unit, or if the state lacks an
    entry that measures one.
    """
    covered = [dimension.name for dimension in profile.dimensions]
    _check(
        covered == list(action.names),
        f"a profile of the policy's dimensions {', '.join(action.names)}, in that order",
        ", ".join(covered),
        f"rename, add or reorder the dimensions of {profile.robot!r} in a copy of its profile (docs/robots.md)",
    )
    for dimension, meaning, unit in zip(profile.dimensions, action.meaning, action.units, strict=True):
        found = f"{dimension.meaning} in {dimension.unit}"
        _check(found == f"{meaning} in {unit}", f"{dimension.name} as {meaning} in {unit}, as the policy gives", found)
    twice = [name for name in names if names.count(name) > 1]
    _check(not twice, "every entry of the state once", ", ".join(names), "rename them where the artifact was made")
    known, wired = dict(zip(names, zip(range(len(names)), units, strict=True), strict=True)), []
    for index, dimension in enumerate(profile.dimensions):
        if dimension.state is None:
            continue
        _check(dimension.state in known, f"the state of {dimension.name} among {', '.join(names)}", dimension.state)
        entry, unit = known[dimension.state]
        factor = _factor(unit, dimension.length)
        expected = f"the state {dimension.state} in {dimension.length} or what converts into it"
        _check(factor is not None, expected, unit)
        wired.append((index, entry, factor or 1.0))
    return StateMatch(*(tuple(column) for column in zip(*wired, strict=True))) if wired else StateMatch((), (), ())


def _factor(unit: str, target: str) -> float | None:
    """The factor from ``unit`` to ``target``; None if they do not convert."""
    if unit == target:
        return 1.0
    for scales in _SCALES:
        if unit in scales and target in scales:
            return scales[unit] / scales[target]
    return None


def _check(holds: bool, expected: str, found: object, remedy: str = REMEDY) -> None:
    if not holds:
        raise UserError(f"expected {expected}, found {'none' if found is None else found}; {remedy}")
