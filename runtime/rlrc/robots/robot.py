"""The seam between the control loop and what it drives. A driver of your own has these methods, and none of them waits.

A camera or an arm that takes its time is read by a thread or a process of the driver's; ``sense`` gives what is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray


class Sensed(NamedTuple):
    """One state of the robot. Stamps are seconds of time.monotonic() at which something was measured.

    ``observation`` is one of rlrc.runtime.inference.policy, ``measured`` (S,) its state vector or None if the policy
    has none, of the time ``stamp``; ``pictures`` has a stamp for each picture of the observation, by its name there.
    """

    observation: Mapping[str, Any]
    measured: NDArray[Any] | None
    stamp: float
    pictures: Mapping[str, float]


class Robot(Protocol):
    @property
    def live_pictures(self) -> bool:
        """Whether two pictures of one camera are never equal bit by bit: one that is shows that the camera hangs."""
        ...

    def sense(self) -> Sensed | None:
        """The newest state there is, None before the first. Raises RobotError if the robot is gone."""
        ...

    def command(self, action: NDArray[Any]) -> None:
        """Send an action (dim,), in the policy's units. Raises RobotError if the robot is gone."""
        ...

    def stop(self) -> None:
        """The robot's own stop, where no command is known to be safe. Raises nothing, and may be called twice.

        It has to work from another thread while ``sense`` or ``command`` hangs: it takes no lock that they hold.
        """
        ...

    def close(self) -> None: ...


class RobotError(RuntimeError):
    """The robot, or a part of it, does not answer. The message says which."""
