"""LeRobot's protocol: its client's messages over grpcio, actions that torch unpickles, what is left out, refusals."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from clients import (
    BEGIN,
    END,
    HELPERS,
    MESSAGES,
    MIDDLE,
    LerobotClient,
    TimedObservation,
    chunks,
    features,
    lerobot,
)
from serving import Served

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime import cli
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.lerobot import LerobotServer
from rlrc.runtime.servers.lerobot_observations import ReceivedObservation, RobotClient
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire import pickles, protobuf
from rlrc.runtime.wire.ports import CLIENTS, LARGEST, Access

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
MOTORS = {"shoulder.pos": 0.1, "elbow.pos": np.float32(0.5), "gripper.pos": np.float64(1.0)}
FEATURES = features(list(MOTORS), {"corner4": (32, 32, 3)})
WORDS = "open the drawer"
WAS_HERE = Path(gettempdir()) / f"rlrc-was-here-{os.getpid()}"


def timed(step: Any = 0, must_go: Any = False, **changes: Any) -> TimedObservation:
    raw = {**MOTORS, "corner4": PICTURE, "task": WORDS, **changes}
    return TimedObservation(1700000000.0, step, {name: raw[name] for name in raw if raw[name] is not None}, must_go)


@pytest.fixture(autouse=True)
def _classes() -> Iterator[None]:
    with lerobot():
        yield


def actions_of(artifact: Path) -> np.ndarray:
    state = np.array([0.1, 0.5, 1.0], np.float32)
    given = {"image.corner4": PICTURE, "state": state, "instruction": WORDS}
    actions: np.ndarray = LocalPolicy.load(artifact).infer(given)["actions"]
    return actions


@pytest.fixture(scope="module")
def expected(toy_artifact: Path) -> np.ndarray:
    return actions_of(toy_artifact)


@pytest.fixture(scope="module")
def served(toy_artifact: Path) -> Iterator[Served]:
    with Served(toy_artifact, protocols=("lerobot", "openpi")) as running:
        yield running


@pytest.fixture(scope="module")
def connected(served: Served) -> Iterator[LerobotClient]:
    with LerobotClient(served.ports["lerobot"]) as one:
        yield one


@pytest.fixture
def client(connected: LerobotClient) -> LerobotClient:
    connected.start(FEATURES)
    return connected


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_client_unpickles_torch_tensors(client: LerobotClient, expected: np.ndarray, protocol: int) -> None:
    client.send_observation(timed(7), protocol)
    actions = pickle.loads(client.get_actions())
    assert [type(action).__name__ for action in actions] == ["TimedAction"] * 3
    assert [action.timestep for action in actions] == [7, 8, 9]
    np.testing.assert_allclose([action.timestamp for action in actions], 1700000000 + np.arange(3) / 30)
    assert all(type(action.action) is torch.Tensor for action in actions)
    assert actions[0].action.dtype == torch.float32
    found = torch.stack([action.action for action in actions]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_first_versions_of_lerobot_get_their_own_class(served: Served, expected: np.ndarray) -> None:
    with lerobot("lerobot.scripts.server.helpers"), LerobotClient(served.ports["lerobot"]) as client:
        client.start(FEATURES, actions_per_chunk=2)
        client.send_observation(timed())
        actions = pickle.loads(client.get_actions())
        assert type(actions[0]).__module__ == "lerobot.scripts.server.helpers"
        np.testing.assert_allclose(np.stack([one.action for one in actions]), expected[:2], rtol=0, atol=1e-6)


def test_large_observations_come_in_chunks(client: LerobotClient, expected: np.ndarray) -> None:
    unused = np.zeros((1024, 1024, 3), np.uint8)
    client.send(chunks(pickle.dumps(timed(1, unused=unused)), 2**20))
    assert len(pickle.loads(client.get_actions())) == 3
    state = {"data": b"torn", "transfer_state": BEGIN}
    again = [MESSAGES["Observation"](**state), *chunks(pickle.dumps(timed(2, must_go=True)), 1000)]
    client.send(iter(again))  # a new beginning drops what came before
    found = np.stack([action.action for action in pickle.loads(client.get_actions())])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_newest_observation_is_answered_and_nothing_twice(client: LerobotClient) -> None:
    client.send_observation(timed(0))
    client.send_observation(timed(4, **{"shoulder.pos": 0.3}))
    assert pickle.loads(client.get_actions())[0].timestep == 4
    begun = time.monotonic()
    assert client.get_actions() == b""  # nothing came within two seconds
    assert 1.5 < time.monotonic() - begun < 10
    waiting: list[bytes] = []
    thread = threading.Thread(target=lambda: waiting.append(client.get_actions()))
    thread.start()
    client.send_observation(timed(4, **{"shoulder.pos": 0.9}))  # answered already: left out
    client.send_observation(timed(5, **{"shoulder.pos": 0.3 + 1e-4}))  # as before: left out
    client.send_observation(timed(6, **{"shoulder.pos": 0.9}))
    thread.join()
    assert pickle.loads(waiting[0])[0].timestep == 6
    client.send_observation(timed(6, must_go=True))  # the client has nothing left to do
    assert pickle.loads(client.get_actions())[0].timestep == 6


def test_what_is_left_out(tiny_manifest: Any) -> None:
    spec: PolicySpec = tiny_manifest.policy  # scale of the state: 0.5, 0.25, 0.5

    def at(step: int, x: float, words: str = "open", must_go: bool = False) -> ReceivedObservation:
        return ReceivedObservation(
            HELPERS, 0.0, step, must_go, {"state": np.array([x, 0.5, 1.0]), "instruction": words}
        )

    robot = RobotClient(None, spec)
    assert robot.offer(at(0, 0.1))
    robot.mark_answered(at(0, 0.1))
    # At 0.01 of the scale or more, it is another observation: 0.1 + 0.5 * 0.01.
    for one, taken in (
        (at(1, 0.1049), False),
        (at(1, 0.1051), True),
        (at(0, 9.0), False),
        (at(0, 0.1, must_go=True), True),
        (at(1, 0.1, "close"), True),
    ):
        assert robot.offer(one) == taken


def test_ready_begins_anew(client: LerobotClient) -> None:
    client.send_observation(timed(3))
    assert pickle.loads(client.get_actions())[0].timestep == 3
    client.start(FEATURES)
    client.send_observation(timed(3))
    assert pickle.loads(client.get_actions())[0].timestep == 3


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    found: Any = error.value
    return found.code(), found.details()


def test_who_is_refused_again_and_again_is_made_to_pause(toy_artifact: Path) -> None:
    served = Served(toy_artifact, "--token", "secret", protocols=("lerobot",))
    with LerobotClient(served.ports["lerobot"]) as client:  # whose loop has no pause of its own
        begun, calls = time.monotonic(), 0
        while time.monotonic() - begun < 2.5:
            refused(client.get_actions)
            calls += 1
        assert calls <= 4
    with LerobotClient(served.ports["lerobot"], ("authorization", "Bearer secret")) as client:
        client.start(FEATURES)
        wrong = timed(**{"elbow.pos": np.nan})
        begun = time.monotonic()
        for _ in range(2):
            refused(lambda: client.send_observation(wrong))  # one or two broken ones do not hold up its robot
        assert time.monotonic() - begun < 0.5
        begun, calls = time.monotonic(), 0
        while time.monotonic() - begun < 2.5:
            refused(lambda: client.send_observation(wrong))
            calls += 1
        assert calls <= 4
    code, log = served.end()
    assert code == 0
    assert len(log.splitlines()) < 10


class Evil:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {WAS_HERE}",)


class Huge:
    """An array without bytes, as numpy pickles it, of sizes that none can have."""

    def __reduce__(self) -> Any:
        from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]

        return _frombuffer, (b"", np.dtype("u1"), (0, 2**39, 2**39), "C")


def huge() -> bytes:
    """A picture that says it has 4 GB, with the bytes of the small one."""
    small = pickle.dumps(timed(corner4=np.zeros((64, 64, 3), np.uint8)), 4)
    assert small.count(b"K@K@K\x03\x87") == 1  # the shape: 64, 64, 3
    return small.replace(b"K@K@K\x03\x87", b"J\0\0\1\0J\0\0\1\0K\1\x87")


WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "expected a pickle as LeRobot's client writes it"),
    "no pickle": (lambda: b"hello", "expected a pickle"),
    "cut": (lambda: pickle.dumps(timed())[:-20], "expected a pickle"),
    "a command": (lambda: pickle.dumps(Evil()), "found 'posix.system'"),
    "a command within": (lambda: pickle.dumps(timed(corner4=Evil())), "found 'posix.system'"),
    "a command of old": (lambda: b"cos\nsystem\n(S'id'\ntR.", "found 'os.system'"),
    "eval": (lambda: b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "found 'builtins.eval'"),
    "a dotted name": (lambda: b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "found 'numpy.dtype.__init__'"),
    "a tensor": (lambda: pickle.dumps(timed(corner4=torch.zeros(2))), "found 'torch._utils._rebuild_tensor_v2'"),
    "another class": (lambda: pickle.dumps(OrderedDict()), "found 'collections.OrderedDict'"),
    "an instance of old": (lambda: b"(ios\nsystem\n.", "found the opcode INST"),
    "a function of the state": (lambda: b"\x80\x02]}b.", "no Call to add to"),
    "a number": (lambda: pickle.dumps(3), "expected LeRobot's TimedObservation"),
    "4 GB": (huge, "expected 4294967296 bytes"),
    "4 GB of bytes": (lambda: b"\x80\x04\x8e\0\0\0\0\1\0\0\0.", "expected a pickle"),
    "a place far away": (lambda: b"\x80\x02Nr\xff\xff\xff\x7f.", "expected LeRobot's TimedObservation"),
    "many opcodes": (lambda: pickle.dumps(list(range(20_000))), "expected up to 10000 opcodes"),
    "colliding keys": (lambda: pickle.dumps({k * (2**61 - 1): 0 for k in range(9)}), "a key that is a int"),
    "half words": (lambda: b"\x80\x02X\x03\0\0\0\xed\xa0\x80.", "expected a pickle"),
    "no motor": (lambda: pickle.dumps(timed(**{"elbow.pos": None})), "expected the number elbow.pos"),
    "motor of text": (lambda: pickle.dumps(timed(**{"elbow.pos": "0"})), "expected elbow.pos as a number, found '0'"),
    "motor of nan": (lambda: pickle.dumps(timed(**{"elbow.pos": np.nan})), "elbow.pos as a finite number, found nan"),
    "motor of a huge number": (
        lambda: pickle.dumps(timed(**{"elbow.pos": 10**400})),
        "found an integer of more than 64",
    ),
    "two motors": (lambda: pickle.dumps(timed(**{"elbow.pos": np.zeros(2)})), "as a number, found an array (2,)"),
    "no picture": (lambda: pickle.dumps(timed(corner4=None)), "expected observation.images.corner4"),
    "objects": (lambda: pickle.dumps(timed(corner4=np.array([None]))), "found dtype '|O8'"),
    "transposed": (lambda: pickle.dumps(timed(corner4=PICTURE.transpose(2, 0, 1))), "found uint8 (3, 32, 32)"),
    "small": (lambda: pickle.dumps(timed(must_go=True, corner4=PICTURE[1:])), ""),  # the policy's own refusal
    "words of bytes": (lambda: pickle.dumps(timed(task=b"open")), "expected an instruction as text"),
    "step of text": (lambda: pickle.dumps(TimedObservation(0.0, "0", {})), "a timestep"),  # type: ignore[arg-type]
    "step too far": (lambda: pickle.dumps(TimedObservation(0.0, 2**40, {})), "a timestep"),
    "time of nan": (lambda: pickle.dumps(TimedObservation(float("nan"), 0, {})), "a timestamp in seconds, found nan"),
    "words of numpy": (lambda: pickle.dumps(timed(task=np.float32(1))), "expected the task as text, found scalar"),
    "sizes of no array": (lambda: pickle.dumps(timed(corner4=Huge())), "which numpy does not take"),
    "a reference to nothing": (lambda: b"\x80\x02h\x07.", "found: 'a reference to nothing'"),
    "no map": (lambda: pickle.dumps(TimedObservation(0.0, 0, [])), "as a map, found list"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_one_line(client: LerobotClient, name: str) -> None:
    data, expected_text = WRONG[name]
    WAS_HERE.unlink(missing_ok=True)
    message = data() or b"\x80"
    if name == "small":
        client.send(chunks(message))
        code, told = refused(client.get_actions)
    else:
        code, told = refused(lambda: client.send(chunks(message)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert expected_text in told
    assert told.startswith("expected ")
    assert "\n" not in told
    assert not WAS_HERE.exists()
    client.send_observation(timed(must_go=True))
    assert len(pickle.loads(client.get_actions())) == 3


def message(state: int, data: bytes = b"") -> Any:
    return MESSAGES["Observation"](transfer_state=state, data=data)


def test_streams_that_do_not_end_well_are_refused(client: LerobotClient) -> None:
    cases = [
        ([], "found the end of its stream"),
        ([message(BEGIN, b"x")], "found the end of its stream"),
        ([message(0, b"x")], "expected a chunk's transfer state"),
        ([message(9, b"x")], "expected a chunk's transfer state"),
        ([message(MIDDLE, bytes(2**21))] * 9, "expected an observation of up to 16777216 bytes"),
        ([message(END)], "expected a pickle"),
    ]
    for messages, told in cases:
        code, found = refused(lambda messages=messages: client.send(iter(messages)))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert told in found
    code, told = refused(lambda: client.send(iter([message(END, bytes(LARGEST))])))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC's own limit of a message
    assert f"larger than max ({LARGEST + 7} vs. {LARGEST})" in told
    assert refused(lambda: client.send(iter([message(END, bytes(5 * 2**20))])))[1].startswith("expected a pickle")


def test_a_token_is_asked_for(toy_artifact: Path) -> None:
    with Served(toy_artifact, "--token", "secret", protocols=("lerobot",)) as served:
        for metadata in ((), (("authorization", "Bearer other"),)):
            with LerobotClient(served.ports["lerobot"], *metadata) as client:
                assert refused(lambda client=client: client.start(FEATURES))[0] == grpc.StatusCode.UNAUTHENTICATED
        with LerobotClient(served.ports["lerobot"], ("authorization", "Bearer secret")) as client:
            client.start(FEATURES)
            client.send_observation(timed())
            assert len(pickle.loads(client.get_actions())) == 3


def test_a_client_that_waits_keeps_its_place(tiny_manifest: Any) -> None:
    spec: PolicySpec = tiny_manifest.policy

    async def connect() -> None:
        server = LerobotServer(Session(spec), observations.load("own", spec, None, "lerobot"), Access())
        for number in range(CLIENTS):
            await server.ready(f"{number}", b"")
        with pytest.raises(RequestRefused, match=r"the server is full .32 clients.; retry later"):
            await server.ready("more", b"")
        waiting = asyncio.ensure_future(server.actions("0", b""))
        await asyncio.sleep(1.1)
        await server.ready("more", b"")  # in the place of one that does nothing
        assert await waiting == b""
        assert await server.actions("1", b"") == b""  # it comes back, in the place of another that does nothing
        assert await server.actions("0", b"") == b""

    asyncio.run(connect())


def test_it_is_served_on_this_machine_only(toy_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve = ["serve", str(toy_artifact), "--port", "0", "--protocol", "lerobot"]
    assert cli.main([*serve, "--host", "0.0.0.0", "--insecure", "--token", "t"]) == 2
    assert "expected --host 127.0.0.1 with lerobot" in capsys.readouterr().err


def test_sigterm_ends_it_with_a_client_that_waits(toy_artifact: Path) -> None:
    served = Served(toy_artifact, protocols=("lerobot",))
    with LerobotClient(served.ports["lerobot"]) as client:
        client.start(FEATURES)
        thread = threading.Thread(target=lambda: refused(client.get_actions))
        thread.start()
        time.sleep(0.2)
        code, complaints = served.end()
        thread.join()
    assert code == 0, complaints
    assert "Traceback" not in complaints


def test_messages_are_those_of_protobuf() -> None:
    for size in (0, 1, 127, 128, 300, 70_000):
        data = bytes(size)
        actions = MESSAGES["Actions"](data=data)
        written = protobuf.with_data(data)
        assert MESSAGES["Actions"].FromString(written) == actions
        assert size == 0 or written == actions.SerializeToString()  # protobuf leaves empty bytes out
        observation = MESSAGES["Observation"](transfer_state=END, data=data).SerializeToString()
        assert protobuf.fields(observation).get(1) == END
        assert protobuf.data(observation, 2) == data
    more = b"\x1a\x01x" + b"\x21" + bytes(8) + b"\x2d" + bytes(4) + b"\x08\xac\x02"  # fields 3, 4, 5; 1 is 300
    assert protobuf.fields(more) == {3: b"x", 4: bytes(8), 5: bytes(4), 1: 300}
    for wrong in (b"\x08", b"\x12\x05abc", b"\x0b", b"\x80" * 11, b"\x12\xff\xff\xff\xff\x0f", b"\x08\x01" * 100):
        with pytest.raises(UserError, match="expected one of LeRobot's messages"):
            protobuf.fields(wrong)
    with pytest.raises(UserError, match="expected bytes as field 1, found a number"):
        protobuf.data(b"\x08\x01")


ARRAYS = (
    np.arange(6, dtype=">i2").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3), np.float16),
    np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    np.zeros((), np.uint8),
    np.array([True, False]),
    np.float32(1.5),
    np.int64(-7),
)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_are_read_as_pickle_reads_them(protocol: int) -> None:
    for array in ARRAYS:
        found = pickles.array(pickles.read(pickle.dumps(array, protocol)))
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert found.shape == array.shape
    plain = {"a": [1, -1, 2**40, 1.5, True, None], "b": ("x", "é", b"y" * 300, (), [], {}), "c": (1, 2, 3)}
    assert pickles.read(pickle.dumps(plain, protocol)) == plain


def test_nothing_is_allocated_that_is_not_there() -> None:
    for data in (huge(), WRONG["4 GB of bytes"][0](), WRONG["a place far away"][0]()):
        tracemalloc.start()
        try:
            pickles.array(pickles.read(data).state["observation"]["corner4"])
        except (UserError, AttributeError):
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2**20
