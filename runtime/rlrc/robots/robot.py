"""The interface between the control loop and the robot. Your own driver has these methods, and none of them waits.

Read a slow camera or arm in a thread or process of the driver; ``sense`` returns the newest values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray


class Sensed(NamedTuple):
    """One state of the robot. Stamps are times of measurement in seconds of time.monotonic().

    ``observation``: see rlrc.runtime.inference.policy. ``measured`` (S,) is its state vector, measured at ``stamp``;
    None if the policy has no state. ``pictures`` has the stamp of each picture by its name in the observation.
    """

    observation: Mapping[str, Any]
    measured: NDArray[Any] | None
    stamp: float
    pictures: Mapping[str, float]


class Robot(Protocol):
    @property
    def live_pictures(self) -> bool:
        """Whether two pictures of one camera are never equal bit by bit: a repeated one then shows that it hangs."""
        ...

    def sense(self) -> Sensed | None:
        """The newest state, None before the first. Raises RobotError if the robot does not answer."""
        ...

    def command(self, action: NDArray[Any]) -> None:
        """Send an action (dim,), in the policy's units. Raises RobotError if the robot does not answer."""
        ...

    def stop(self) -> None:
        """The robot's own stop, for when no command is known to be safe. Raises nothing, and may be called twice.

        It must work from another thread while ``sense`` or ``command`` hangs: it must take no lock that they hold.
        """
        ...

    def close(self) -> None: ...


class RobotError(RuntimeError):
    """The robot, or a part of it, does not answer. The message names the part."""
