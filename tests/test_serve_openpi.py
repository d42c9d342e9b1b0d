"""openpi's protocol: the public client and hand-made frames, equal actions, refusals, tokens, limits, drain."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from load_attacks import UPGRADE
from serving import Served, wait_for
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.wire import arrays
from rlrc.runtime.wire.ports import LARGEST

CLIENT = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_client.action_chunk_broker import ActionChunkBroker
policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
with np.load(sys.argv[2]) as recorded:
    observation = {"image.corner4": recorded["image"], "state": recorded["state"], "instruction": "open the drawer"}
first, second = policy.infer(observation), policy.infer(observation)
broker = ActionChunkBroker(policy, 3)
rows = [broker.infer(observation)["actions"].tolist() for _ in range(3)]
told = sorted(second["server_timing"])
try:
    policy.infer({"state": observation["state"]})
    error = ""
except RuntimeError as refused:
    error = str(refused)
print(json.dumps({"actions": first["actions"].tolist(), "rows": rows, "told": told, "error": error,
                  "metadata": policy.get_server_metadata()}))
"""


def observation(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "image.corner4": random.integers(0, 256, (32, 32, 3), np.uint8),
        "state": random.uniform(0, 1, 3).astype(np.float32),
        "instruction": "open the drawer",
    }


@contextmanager
def opened(served: Served, **options: Any) -> Iterator[ClientConnection]:
    url = f"ws://127.0.0.1:{served.ports['openpi']}"
    with connect(url, compression=None, max_size=None, proxy=None, **options) as connection:
        assert arrays.unpack(connection.recv(30))["server"] == "rlrc"
        yield connection


def asked(connection: ClientConnection, message: Any) -> Any:
    connection.send(arrays.pack(message) if isinstance(message, dict) else message)
    found = connection.recv(30)
    return found if isinstance(found, str) else arrays.unpack(found)


@pytest.fixture(scope="module")
def served(toy_artifact: Path) -> Iterator[Served]:
    with Served(toy_artifact) as running:
        yield running


def test_actions_are_those_of_the_policy_in_this_process(served: Served, toy_artifact: Path) -> None:
    policy = LocalPolicy.load(toy_artifact)
    with opened(served) as connection:
        for seed in range(3):
            found = asked(connection, observation(seed))
            np.testing.assert_allclose(found["actions"], policy.infer(observation(seed))["actions"], rtol=0, atol=1e-6)
            assert found["policy_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in found["server_timing"]) == (seed > 0)


@pytest.mark.skipif("RLRC_OPENPI_PYTHON" not in os.environ, reason="RLRC_OPENPI_PYTHON: a Python with openpi-client")
def test_the_public_client_works_unchanged(served: Served, toy_artifact: Path, tmp_path: Path) -> None:
    given = observation()
    np.savez(tmp_path / "obs.npz", image=given["image.corner4"], state=given["state"])
    command = [os.environ["RLRC_OPENPI_PYTHON"], "-c", CLIENT, str(served.ports["openpi"]), str(tmp_path / "obs.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = LocalPolicy.load(toy_artifact).infer(given)["actions"]
    np.testing.assert_allclose(found["actions"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["rows"], expected, rtol=0, atol=1e-6)
    assert found["told"] == ["infer_ms", "prev_total_ms"]
    assert "expected image.corner4 in the observation, found state" in found["error"]
    assert found["metadata"]["horizon"] == 3


WRONG = {
    "text": "hello",
    "not msgpack": b"\xc1",
    "cut": arrays.pack({"state": np.zeros(3, np.float32)})[:-4],
    "a list": msgpack.packb([1, 2]),
    "no picture": {"state": np.zeros(3, np.float32), "instruction": "open"},
    "state of integers": observation() | {"state": np.zeros(3, np.int64)},
    "short state": observation() | {"state": np.zeros(2, np.float32)},
    "nan": observation() | {"state": np.full(3, np.nan)},
    "picture of floats": observation() | {"image.corner4": np.zeros((32, 32, 3), np.float32)},
    "picture in CHW": observation() | {"image.corner4": np.zeros((3, 32, 32), np.uint8)},
    "small picture": observation() | {"image.corner4": np.zeros((31, 32, 3), np.uint8)},
    "instruction of bytes": observation() | {"instruction": b"open"},
    "noise": observation() | {"noise": np.zeros(3, np.float32)},
    "noise of text": observation() | {"noise": "loud"},
    "instruction of numbers": observation() | {"instruction": np.zeros(3)},
    "msgpack-numpy": msgpack.packb(
        observation()
        | {
            "state": {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": (3,), b"data": b"\0" * 12},
            "image.corner4": 0,
        }
    ),
    "4 GB": msgpack.packb({"state": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [2**30]}}),
    "objects": msgpack.packb({"state": {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "|O", b"shape": [1]}}),
    "declared list of 4 G": b"\xdd\xff\xff\xff\xff",
    "nested": b"\x91" * 100_000,
    "no state": observation() | {"state": None},
    "a number that is none": msgpack.packb({"state": {b"__npgeneric__": True, b"data": float("nan"), b"dtype": "<i4"}}),
    "sizes of no array": msgpack.packb(
        {"state": {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0, 2**62, 2**62]}}
    ),
    "many maps": b"\xdc\x01\x00" + (b"\xdc\x10\x00" + b"\x80" * 4096) * 256,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_line_and_ends_the_connection(served: Served, name: str) -> None:
    with opened(served) as connection:
        told = asked(connection, WRONG[name])
        assert isinstance(told, str)
        assert "expected" in told
        assert "found" in told
        assert "Traceback" not in told
        assert "\n" not in told
        with pytest.raises(ConnectionClosedError) as closed:
            connection.recv(30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011
    with opened(served) as connection:
        assert asked(connection, observation())["actions"].shape == (3, 4)


def test_garbage_leaves_the_server_as_it_was(served: Served) -> None:
    random, good = np.random.default_rng(0), bytearray(arrays.pack(observation()))
    stack = ExitStack()
    connection = stack.enter_context(opened(served))
    for _ in range(150):
        message = bytearray(good)
        for place in random.integers(0, min(len(message), 200), 3):
            message[place] = random.integers(0, 256)
        for place in random.integers(len(message) - 120, len(message), 3):
            message[place] = random.integers(0, 256)
        found = asked(connection, bytes(message))
        if isinstance(found, str):
            assert "fault" not in found
            stack.close()
            connection = stack.enter_context(opened(served))
        else:
            assert np.isfinite(found["actions"]).all()
    stack.close()
    assert served.get("/readyz") == (200, "ready\n")


def test_a_message_that_is_too_large_is_refused_unread(toy_artifact: Path) -> None:
    served = Served(toy_artifact)
    with opened(served) as connection, pytest.raises(ConnectionClosedError) as closed:
        connection.send(b"\0" * (LARGEST + 1))
        connection.recv(30)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009
    with socket.create_connection(("127.0.0.1", served.ports["openpi"]), 8) as broken:
        broken.sendall(UPGRADE)
        broken.recv(4096)
        broken.sendall(b"\xc3\x80\0\0\0\0")  # which are none
        while broken.recv(4096):
            pass
    with opened(served):
        pass
    code, log = served.end()
    assert code == 0
    assert "expected a message of up to 16777216 bytes, found a larger one; send smaller pictures" in log
    assert "expected WebSocket frames, found: invalid opcode; use openpi-client" in log
    assert ": gone" not in log  # that is said of clients that left in the middle of something


def test_two_tokens_are_none(toy_artifact: Path) -> None:
    request = UPGRADE.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer secret\r\nAuthorization: Bearer x\r\n\r\n")
    served = Served(toy_artifact, "--token", "secret")
    for sent in (request, request.replace(b"Bearer x", b"Bearer \xff\xe9"), UPGRADE):
        with socket.create_connection(("127.0.0.1", served.ports["openpi"]), 8) as connection:
            connection.sendall(sent)
            assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")
    for sent in (b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", request.replace(b"\r\n", b"\r\r\n")):
        with socket.create_connection(("127.0.0.1", served.ports["openpi"]), 8) as connection:
            connection.sendall(sent)
            while connection.recv(4096):
                pass
    with socket.create_connection(("127.0.0.1", served.ports["openpi"]), 8):  # a port scan
        pass
    code, log = served.end()
    assert code == 0
    assert "found another token or none; send it" in log
    assert "expected openpi's WebSocket, found: did not receive a valid HTTP request; use openpi-client" in log
    assert "secret" not in log
    assert "Traceback" not in log


def test_a_page_in_a_browser_does_not_get_in(served: Served) -> None:
    with pytest.raises(InvalidStatus) as refused, opened(served, origin="http://example.org"):
        pass
    assert refused.value.response.status_code == 403


def test_health_and_metrics(served: Served) -> None:
    with opened(served) as connection:
        asked(connection, observation())
    assert served.get("/healthz") == (200, "OK\n")
    assert served.get("/readyz") == (200, "ready\n")
    status, text = served.get("/metrics")
    assert status == 200
    assert 'rlrc_observations_total{outcome="answered",protocol="openpi"}' in text
    assert "rlrc_ready 1\n" in text
    count = next(line for line in text.splitlines() if line.startswith("rlrc_inference_seconds_count"))
    assert f'rlrc_inference_seconds_bucket{{le="+Inf"}} {count.split()[1]}\n' in text
    assert served.get("/elsewhere")[0] == 426  # a WebSocket, or nothing


def test_a_token_is_asked_for(toy_artifact: Path) -> None:
    with Served(toy_artifact, "--token", "secret") as served:
        for header in ({}, {"Authorization": "Api-Key other"}, {"Authorization": "secret"}):
            with pytest.raises(InvalidStatus) as refused, opened(served, additional_headers=header):
                pass
            assert refused.value.response.status_code == 401
        for scheme in ("Api-Key", "Bearer"):
            with opened(served, additional_headers={"Authorization": f"{scheme} secret"}) as connection:
                assert asked(connection, observation())["actions"].shape == (3, 4)
        assert served.get("/healthz")[0] == 200
        assert served.get("/metrics")[0] == 401
        assert served.get("/metrics", Authorization="Bearer secret")[0] == 200


def test_many_at_once_are_answered_or_refused_clearly(toy_artifact: Path) -> None:
    with Served(toy_artifact, "--waiting", "2") as served, ExitStack() as stack:
        os.kill(served.worker(), signal.SIGSTOP)  # so that they queue up
        connections = [stack.enter_context(opened(served)) for _ in range(4)]
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda one=one: found.append(asked(one, observation()))) for one in connections
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(found) == 2)
        assert all("expected fewer than 2 queued observations" in told for told in found)
        assert served.get("/healthz") == (200, "OK\n")  # nothing waits for the policy but who asked it
        assert "rlrc_observations_waiting 2\n" in served.get("/metrics")[1]
        os.kill(served.worker(), signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert [one["actions"].shape for one in found[2:]] == [(3, 4), (3, 4)]


def test_on_sigterm_accepted_requests_are_answered(toy_artifact: Path) -> None:
    served = Served(toy_artifact)
    worker = served.worker()
    os.kill(worker, signal.SIGSTOP)
    with opened(served) as connection:
        connection.send(arrays.pack(observation()))
        wait_for(lambda: "rlrc_observations_waiting 1\n" in served.get("/metrics")[1])
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: served.get("/readyz") == (503, "ending\n"))
        os.kill(worker, signal.SIGCONT)
        assert arrays.unpack(connection.recv(30))["actions"].shape == (3, 4)  # type: ignore[arg-type]
    assert served.end()[0] == 0


def test_a_policy_that_is_killed_ends_the_server(toy_artifact: Path) -> None:
    served = Served(toy_artifact)
    with opened(served) as connection:
        os.kill(served.worker(), signal.SIGKILL)
        code, complaints = served.process.wait(30), served.end()[1]
        assert code == 1
        assert "inference ended" in complaints
        with pytest.raises(ConnectionClosed):
            asked(connection, observation())


def test_an_earlier_client_that_asks_for_shared_memory_finds_no_room_in_it(served: Served) -> None:
    url, asks = f"ws://127.0.0.1:{served.ports['openpi']}", {"X-Shared-Memory": "1"}
    with connect(url, compression=None, max_size=None, proxy=None, additional_headers=asks) as connection:
        path = arrays.unpack(connection.recv(30))["shared_memory"]  # type: ignore[arg-type]
        descriptor = os.open(path, os.O_RDWR)
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK  # that client opens no other memory
        assert len(mmap.mmap(descriptor, 0)) == 1
        os.close(descriptor)
        assert asked(connection, observation())["actions"].dtype == np.float32
    with connect(url, compression=None, max_size=None, proxy=None) as connection:
        assert "shared_memory" not in arrays.unpack(connection.recv(30))  # type: ignore[arg-type]
