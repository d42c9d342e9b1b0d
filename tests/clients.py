"""What GR00T's and LeRobot's own clients put on the wire, for the tests: pyzmq, msgpack, grpcio, protobuf and pickle.

``Gr00tClient`` does what gr00t/eval/service.py (N1.5) and gr00t/policy/server_client.py (N1.6, N1.7) do. ``lerobot``
puts LeRobot's classes where pickle finds them; ``LerobotClient`` does what its async_inference/robot_client.py does.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import grpc
import msgpack
import numpy as np
import zmq
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


class Gr00tClient:
    """``N1.5`` keeps a modality's configuration in a text, ``N1.6`` in a map."""

    def __init__(self, port: int, generation: str = "N1.6", api_token: str | None = None) -> None:
        self.generation, self.api_token = generation, api_token
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self.socket.connect(f"tcp://localhost:{port}")

    def __enter__(self) -> Gr00tClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def call_endpoint(self, endpoint: str, data: Any = None, requires_input: bool = True) -> Any:
        request: dict[str, Any] = {"endpoint": endpoint}
        if requires_input:
            request["data"] = data
        if self.api_token:
            request["api_token"] = self.api_token
        response = self.send(gr00t_packed(request))
        if isinstance(response, dict) and "error" in response:
            raise RuntimeError(f"Server error: {response['error']}")
        return response

    def send(self, message: bytes) -> Any:
        self.socket.send(message)
        return msgpack.unpackb(self.socket.recv(), object_hook=self._decoded)

    def get_action(self, observation: dict[str, Any]) -> Any:
        if self.generation == "N1.5":
            return self.call_endpoint("get_action", observation)
        return tuple(self.call_endpoint("get_action", {"observation": observation, "options": None}))

    def _decoded(self, values: dict[str, Any]) -> Any:
        if "__ModalityConfig_class__" in values:
            found = json.loads(values["as_json"]) if self.generation == "N1.5" else values["as_json"]
            return {"delta_indices": found["delta_indices"], "modality_keys": found["modality_keys"]}
        if "__ndarray_class__" in values:
            return np.load(io.BytesIO(values["as_npy"]), allow_pickle=False)
        return values


def gr00t_packed(message: Any) -> bytes:
    def encoded(value: Any) -> Any:
        output = io.BytesIO()
        np.save(output, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": output.getvalue()}

    packed: bytes = msgpack.packb(message, default=encoded)
    return packed


@dataclass
class TimedData:
    timestamp: float
    timestep: int


@dataclass
class TimedAction(TimedData):
    action: Any


@dataclass
class TimedObservation(TimedData):
    observation: dict[str, Any]
    must_go: bool = False


@dataclass
class RemotePolicyConfig:
    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: dict[str, Any]
    actions_per_chunk: int
    device: str = "cpu"
    rename_map: dict[str, str] = field(default_factory=dict)


HELPERS = "lerobot.async_inference.helpers"


@contextmanager
def lerobot(helpers: str = HELPERS) -> Iterator[None]:
    """LeRobot's classes under their own names, for pickle."""
    packages = [helpers.rsplit(".", number)[0] for number in range(helpers.count(".") + 1)]
    with patch.dict(sys.modules, {name: ModuleType(name) for name in packages}):
        for kind in (TimedAction, TimedObservation, RemotePolicyConfig):
            kind.__module__ = helpers
            setattr(sys.modules[helpers], kind.__name__, kind)
        yield


def _messages() -> dict[str, Any]:
    """The classes of lerobot/transport/services.proto."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="services.proto", package="transport", syntax="proto3")
    states = file.enum_type.add(name="TransferState")
    for number, name in enumerate(("UNKNOWN", "BEGIN", "MIDDLE", "END")):
        states.value.add(name=f"TRANSFER_{name}", number=number)
    for name in ("Observation", "Actions", "PolicySetup", "Empty"):
        message = file.message_type.add(name=name)
        number = 2 if name == "Observation" else 1
        if name != "Empty":
            message.field.add(name="data", number=number, type=kinds.TYPE_BYTES, label=kinds.LABEL_OPTIONAL)
        if name == "Observation":
            kind = {"type": kinds.TYPE_ENUM, "type_name": ".transport.TransferState"}
            message.field.add(name="transfer_state", number=1, label=kinds.LABEL_OPTIONAL, **kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"transport.{message.name}"))
        for message in file.message_type
    }


MESSAGES = _messages()
BEGIN, MIDDLE, END = 1, 2, 3
CHUNK = 2 * 1024 * 1024


class LerobotClient:
    def __init__(self, port: int, *metadata: tuple[str, str]) -> None:
        self.metadata = metadata
        own = [("grpc.use_local_subchannel_pool", 1)]  # other channels of this process are other clients
        self.channel = grpc.insecure_channel(f"localhost:{port}", own)
        unary, path = self.channel.unary_unary, "/transport.AsyncInference/"
        empty, read = MESSAGES["Empty"].SerializeToString, MESSAGES["Empty"].FromString
        self.stub_ready = unary(f"{path}Ready", empty, read)
        self.stub_instruct = unary(f"{path}SendPolicyInstructions", MESSAGES["PolicySetup"].SerializeToString, read)
        self.stub_observe = self.channel.stream_unary(
            f"{path}SendObservations", MESSAGES["Observation"].SerializeToString, read
        )
        self.stub_actions = unary(f"{path}GetActions", empty, MESSAGES["Actions"].FromString)

    def __enter__(self) -> LerobotClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def channel_is_there(self) -> bool:
        """After a lost connection the channel connects anew by itself, in its time."""
        try:
            grpc.channel_ready_future(self.channel).result(timeout=1)
        except grpc.FutureTimeoutError:
            return False
        return True

    def start(self, features: dict[str, Any], actions_per_chunk: int = 50) -> None:
        self.stub_ready(MESSAGES["Empty"](), timeout=30, metadata=self.metadata)
        config = RemotePolicyConfig("act", "user/model", features, actions_per_chunk, "cpu")
        self.instruct(pickle.dumps(config))

    def instruct(self, data: bytes) -> None:
        self.stub_instruct(MESSAGES["PolicySetup"](data=data), timeout=30, metadata=self.metadata)

    def send_observation(self, timed: TimedObservation, protocol: int = pickle.DEFAULT_PROTOCOL) -> None:
        self.send(chunks(pickle.dumps(timed, protocol)))

    def send(self, messages: Iterator[Any]) -> None:
        self.stub_observe(messages, timeout=30, metadata=self.metadata)

    def get_actions(self) -> bytes:
        """The pickle of TimedActions; nothing if there was no observation."""
        answer = self.stub_actions(MESSAGES["Empty"](), timeout=30, metadata=self.metadata)
        return bytes(answer.data)


def chunks(data: bytes, size: int = CHUNK) -> Iterator[Any]:
    """As lerobot/transport/utils.py cuts it."""
    for start in range(0, len(data), size):
        state = BEGIN if start == 0 else MIDDLE
        if start + size >= len(data):
            state = END
        yield MESSAGES["Observation"](transfer_state=state, data=data[start : start + size])


def features(state: list[str], cameras: dict[str, tuple[int, int, int]]) -> dict[str, Any]:
    """What hw_to_dataset_features makes of a robot's motors and cameras."""
    told: dict[str, Any] = {"observation.state": {"dtype": "float32", "shape": (len(state),), "names": state}}
    for name, shape in cameras.items():
        told[f"observation.images.{name}"] = {
            "dtype": "image",
            "shape": shape,
            "names": ["height", "width", "channels"],
            "info": {"is_depth_map": False},
        }
    return told
