"""A robot in ROS 2 (Humble or later), as a driver for ``rlrc run``. Change the topics to your robot's:

    source /opt/ros/DISTRO/setup.bash         # rlrc installed for the same Python
    rlrc run ART --driver ros2_robot:open_robot --profile my_arm.toml --hz 20 --instruction "open the drawer"

Commands go to a forward_command_controller of ros2_control with the joints of the policy's action, in the same order.
That controller keeps the last command forever. This is fine for positions; velocities need a watchdog behind it.
Timestamps of another computer require synchronised clocks (chrony, PTP).
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.robots.robot import RobotError, Sensed

STATE = "/joint_states"  # sensor_msgs/JointState: the policy's state, by its names
PICTURE = "/camera/{name}/image_raw"  # sensor_msgs/Image, for each camera of the policy
COMMAND = "/forward_position_controller/commands"  # std_msgs/Float64MultiArray
OPENING_S = 10.0


class Ros2Robot:
    live_pictures = True  # False for a simulator, which may render identical images

    def __init__(self, spec: PolicySpec, instruction: str) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import qos_profile_sensor_data
        from rclpy.signals import SignalHandlerOptions
        from sensor_msgs.msg import Image, JointState
        from std_msgs.msg import Float64MultiArray

        self._spec, self._instruction, self._message = spec, instruction, Float64MultiArray
        self._state: tuple[np.ndarray, float] | None = None
        self._pictures: dict[str, tuple[np.ndarray, float]] = {}
        self._failure = ""
        # No signal handlers: ROS would shut down on Ctrl-C, before the hold command is sent.
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        self._shut_down = rclpy.shutdown
        self._node = rclpy.create_node("rlrc")
        self._node.create_subscription(JointState, STATE, self._take_joints, qos_profile_sensor_data)
        for camera in spec.cameras:
            topic, name = PICTURE.format(name=camera.name), f"image.{camera.name}"

            def take(message: Any, name: str = name) -> None:
                self._take_picture(message, name)

            self._node.create_subscription(Image, topic, take, qos_profile_sensor_data)
        self._commands = self._node.create_publisher(Float64MultiArray, COMMAND, 1)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for the first state and image of every topic; ``rlrc run`` warms up with them."""
        wanted = [PICTURE.format(name=camera.name) for camera in self._spec.cameras]
        deadline = time.monotonic() + seconds
        while self._state is None or len(self._pictures) < len(wanted):
            if self._failure or time.monotonic() > deadline:
                raise UserError(
                    f"expected {', '.join([STATE, *wanted])}, found {'no' if self._state is None else 'a'} state and "
                    f"{len(self._pictures)} pictures {self._failure}; correct the topics in ros2_robot.py"
                )
            time.sleep(0.05)

    def sense(self) -> Sensed | None:
        if self._failure or not self._thread.is_alive():
            raise RobotError(self._failure or "the ROS receiver thread has ended")
        if self._state is None:
            return None
        (state, stamp), pictures = self._state, dict(self._pictures)
        observation: dict[str, Any] = {name: picture for name, (picture, _) in pictures.items()}
        observation |= {"state": state, "instruction": self._instruction}
        return Sensed(observation, state, stamp, {name: at for name, (_, at) in pictures.items()})

    def command(self, action: np.ndarray) -> None:
        self._commands.publish(self._message(data=action.tolist()))

    def stop(self) -> None:
        """The controller keeps its last command. Call your robot's own stop here, if it has one."""

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join()
        self._node.destroy_node()
        self._shut_down()

    def _take_joints(self, message: Any) -> None:
        state = positions(message, self._spec)
        if state is not None:
            self._state = (state, self._measured_at(message))

    def _take_picture(self, message: Any, name: str) -> None:
        try:
            self._pictures[name] = (pixels(message), self._measured_at(message))
        except ValueError as error:
            self._failure = f"{name}: {error}"

    def _measured_at(self, message: Any) -> float:
        """The message's time stamp, converted to time.monotonic()."""
        stamp = message.header.stamp
        age = self._node.get_clock().now().nanoseconds - (stamp.sec * 10**9 + stamp.nanosec)
        return time.monotonic() - age * 1e-9


def positions(message: Any, spec: PolicySpec) -> np.ndarray | None:
    """The policy's state from a JointState, in the policy's order; None if joints are missing."""
    found = dict(zip(message.name, message.position, strict=False))  # some messages have only velocities
    names = () if spec.state is None else spec.state.names
    return np.array([found[name] for name in names], np.float32) if set(names) <= found.keys() else None


def pixels(message: Any) -> np.ndarray:
    """An Image as RGB, uint8 (height, width, 3). Its rows may be padded."""
    if message.encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"expected rgb8 or bgr8, found {message.encoding}")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    picture = rows[:, : message.width * 3].reshape(message.height, message.width, 3)
    return np.ascontiguousarray(picture[..., ::-1] if message.encoding == "bgr8" else picture)


def open_robot(spec: PolicySpec, instruction: str) -> Ros2Robot:
    """Called by ``--driver ros2_robot:open_robot``."""
    try:
        robot = Ros2Robot(spec, instruction)
    except ModuleNotFoundError as error:
        raise UserError(
            f"expected ROS 2 for this Python, found no module {error.name}; source /opt/ros/DISTRO/setup.bash"
        ) from None
    try:
        robot.wait(OPENING_S)
    except BaseException:
        robot.close()
        raise
    return robot
