"""GR00T's protocol: both generations' messages over pyzmq, equal actions, refusals, and peers that mean no good."""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from clients import Gr00tClient, gr00t_packed
from serving import Served

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime import cli
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.servers import gr00t, observations
from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire import zmtp
from rlrc.runtime.wire.ports import LARGEST, Access

RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (32, 32, 3), np.uint8)
STATE = np.array([0.1, 0.5, 1.0], np.float32)
WORDS = "open the drawer"
NESTED = {
    "video": {"corner4": PICTURE[None, None]},
    "state": {"state": STATE[None, None]},
    "language": {"instruction": [[WORDS]]},
}
FLAT = {"video.corner4": PICTURE[None], "state.state": STATE[None].astype(np.float64), "instruction": [WORDS]}
MAPPING = """
state = [["state", "arm"], ["state", "gripper"]]
instruction = ["language", "annotation.human.task_description"]
generation = "N1.5"
[[cameras]]
key = ["video", "webcam"]
layout = "HWC"
[[actions]]
key = "arm"
size = 3
[[actions]]
key = "gripper"
size = 1
"""


@pytest.fixture(scope="module")
def expected(toy_artifact: Path) -> np.ndarray:
    given = {"image.corner4": PICTURE, "state": STATE, "instruction": WORDS}
    actions: np.ndarray = LocalPolicy.load(toy_artifact).infer(given)["actions"]
    return actions


@pytest.fixture(scope="module")
def served(toy_artifact: Path) -> Iterator[Served]:
    with Served(toy_artifact, protocols=("gr00t", "openpi")) as running:
        yield running


def test_clients_of_n16_get_their_actions(served: Served, expected: np.ndarray) -> None:
    with Gr00tClient(served.ports["gr00t"]) as client:
        assert client.call_endpoint("ping", requires_input=False) == {"status": "ok", "message": "Server is running"}
        assert client.call_endpoint("reset", {"options": None}) == {}
        actions, info = client.get_action(NESTED)
        assert info == {}
        assert actions.keys() == {"action"}
        assert actions["action"].dtype == np.float32
        np.testing.assert_allclose(actions["action"], expected[None], rtol=0, atol=1e-6)  # (B, T, D)
        flat = {"video.corner4": PICTURE[None, None], "state.state": STATE[None, None], "instruction": (WORDS,)}
        actions, _ = client.get_action(flat)  # as N1.6's simulator has it
        np.testing.assert_allclose(actions["action.action"], expected[None], rtol=0, atol=1e-6)
        assert client.call_endpoint("get_modality_config", requires_input=False) == {
            "video": {"delta_indices": [0], "modality_keys": ["corner4"]},
            "state": {"delta_indices": [0], "modality_keys": ["state"]},
            "action": {"delta_indices": [0, 1, 2], "modality_keys": ["action"]},
            "language": {"delta_indices": [0], "modality_keys": ["instruction"]},
        }


def test_clients_of_n15_get_theirs(toy_artifact: Path, expected: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MAPPING)
    with (
        Served(toy_artifact, "--mapping", "gr00t", str(tmp_path / "m.toml"), protocols=("gr00t",)) as served,
        Gr00tClient(served.ports["gr00t"], "N1.5") as client,
    ):
        one = {
            "video.webcam": PICTURE[None],
            "state.arm": STATE[None, :2].astype(np.float64),
            "state.gripper": STATE[None, 2:].astype(np.float64),
            "annotation.human.task_description": [WORDS],
        }
        actions = client.get_action(one)
        assert {name: rows.shape for name, rows in actions.items()} == {"action.arm": (3, 3), "action.gripper": (3, 1)}
        joined = np.concatenate([actions["action.arm"], actions["action.gripper"]], axis=1)
        np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-6)
        text = np.array([WORDS])  # which some clients send, as an array of text
        assert np.array_equal(
            client.get_action(one | {"annotation.human.task_description": text})["action.arm"], actions["action.arm"]
        )
        batched = {name: value[None] if isinstance(value, np.ndarray) else value for name, value in one.items()}
        assert client.get_action(batched)["action.arm"].shape == (1, 3, 3)
        config = client.call_endpoint("get_modality_config", requires_input=False)
        assert {name: told["modality_keys"] for name, told in config.items()} == {
            "video": ["video.webcam"],
            "state": ["state.arm", "state.gripper"],
            "action": ["action.arm", "action.gripper"],
            "language": ["annotation.human.task_description"],
        }


def npy(shape: Any, descr: str = "<f4", data: bytes = b"") -> dict[str, Any]:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (53 - len(header) % 64) + "\n"
    return {
        "__ndarray_class__": True,
        "as_npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin-1") + data,
    }


def asked(**changes: Any) -> bytes:
    return gr00t_packed({"endpoint": "get_action", "data": {"observation": NESTED | changes, "options": None}})


WRONG: dict[str, tuple[bytes, str]] = {
    "not msgpack": (b"\xc1", "expected a msgpack message"),
    "empty": (b"", "expected a msgpack message"),
    "a list": (msgpack.packb([1]), "expected a request as a map, found list"),
    "kill": (gr00t_packed({"endpoint": "kill"}), "found 'kill'"),
    "no data": (gr00t_packed({}), "expected an observation as a map, found NoneType"),
    "no state": (asked(state={}), "expected state.state in the observation"),
    "two robots": (asked(video={"corner4": np.stack([PICTURE[None]] * 2)}), r"found (2, 1, 32, 32, 3)"),
    "two times": (asked(state={"state": np.stack([STATE] * 2)[None]}), "found (1, 2, 3)"),
    "no time": (asked(state={"state": STATE}), "found (3,)"),
    "mixed": (asked(state={"state": STATE[None]}), "expected the same axes"),
    "N1.5's axes": (asked(state={"state": STATE[None]}, video={"corner4": PICTURE[None]}), "expected axes for robots"),
    "transposed": (asked(video={"corner4": PICTURE.transpose(2, 0, 1)[None, None]}), "found uint8 (3, 32, 32)"),
    "state of integers": (asked(state={"state": np.zeros((1, 1, 3), int)}), "as a row of floats"),
    "no words": (asked(language={"instruction": [["open", "close"]]}), "expected an instruction as text"),
    "video of numbers": (asked(video=3), "expected video as a map"),
    "names of lines": (asked(video={"a\nb": 3}), r"expected video.a\nb as an array, found 3"),
    "4 GB": (asked(state={"state": npy((2**30,))}), "expected 4294967296 bytes"),
    "many bytes": (asked(state={"state": npy((10**30,))}), "expected an array's shape"),
    "objects": (asked(state={"state": npy((1,), "|O", bytes(8))}), "found dtype '|O'"),
    "records": (asked(state={"state": npy((1,), "|V8", bytes(8))}), "found dtype '|V8'"),
    "no .npy": (asked(state={"state": {"__ndarray_class__": True, "as_npy": b"PK"}}), "expected an array as a .npy"),
    "openpi's": (asked(state={"state": {b"__ndarray__": True}}), "found another's"),
    "half a text": (asked(language={"instruction": npy((1,), "<U1", b"\xff\xff\xff\xff")}), "expected text in Unicode"),
    "long words": (asked(language={"instruction": "open " * 1000}), "up to 4096 characters"),
    "nested": (b"\x91" * 100_000, "expected a msgpack message"),
    # Names that the mapping does not have are named.
    "another camera": (
        asked(video={"front": PICTURE[None, None]}),
        "expected video.corner4 in the observation, found language.instruction, state.state, video.front; send it",
    ),
    "other states": (
        asked(state={"arm": STATE[None, None], "gripper": STATE[None, None]}),
        "expected state.state in the observation, found language.instruction, state.arm, state.gripper, video.corner4",
    ),
    "no number": (asked(state={"state": None}), "expected state.state as an array, found None; send what was measured"),
    "a picture of bytes": (asked(video={"corner4": b"\xff"}), "expected video.corner4 as an array, found bytes"),
    "words of nothing": (asked(language={"instruction": None}), "at language.instruction, found None there; send one"),
    "an array for an endpoint": (gr00t_packed({"endpoint": STATE}), "found ndarray; use one of these"),
    "an endpoint of maps": (gr00t_packed({"endpoint": {"get_action": 1}}), "found dict; use one of these"),
    "too large": (
        b"\0" * (LARGEST + 1),
        "expected a request of up to 16777216 bytes, found a larger one; send smaller images",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_line(served: Served, name: str) -> None:
    message, expected_text = WRONG[name]
    with Gr00tClient(served.ports["gr00t"]) as client:
        found = client.send(message)
        assert found.keys() == {"error"}
        assert expected_text in found["error"]
        assert found["error"].startswith("expected ")
        assert "\n" not in found["error"]
        actions, _ = client.get_action(NESTED)  # the connection goes on
        assert actions["action"].shape == (1, 3, 4)


def test_a_camera_that_is_called_otherwise_is_not_dropped(tiny_manifest: Any) -> None:
    """Not even where the policy does without it."""
    spec: PolicySpec = tiny_manifest.policy
    cameras = (spec.cameras[0], replace(spec.cameras[0], name="wrist", optional=True))
    mapped = observations.load("own", replace(spec, cameras=cameras), None, "gr00t")
    server = gr00t.Gr00tServer(Session(spec), mapped, Access())
    server._check_cameras({"corner4": PICTURE})
    server._check_cameras({"corner4": PICTURE, "wrist": PICTURE, "more": PICTURE})
    with pytest.raises(UserError, match=r"cameras corner4, wrist in video, found wrst and no wrist; rename it"):
        server._check_cameras({"corner4": PICTURE, "wrst": PICTURE})


def test_a_token_is_asked_for(toy_artifact: Path) -> None:
    with Served(toy_artifact, "--token", "secret", protocols=("gr00t",)) as served:
        for token in (None, "other"):
            with Gr00tClient(served.ports["gr00t"], api_token=token) as client:
                for endpoint in ("get_action", "ping", "kill"):
                    with pytest.raises(RuntimeError, match="Server error: expected the server's api_token"):
                        client.call_endpoint(endpoint, {"observation": NESTED})
        with Gr00tClient(served.ports["gr00t"], api_token="secret") as client:
            assert client.get_action(NESTED)[0]["action"].shape == (1, 3, 4)


def connect(served: Served, sent: bytes) -> socket.socket:
    """A peer that sends what it likes, and waits for less than the server would wait for the rest."""
    peer = socket.create_connection(("127.0.0.1", served.ports["gr00t"]), timeout=5)
    peer.sendall(sent)
    return peer


READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
HELLO = zmtp.GREETING + READY
HOSTILE = {
    "an old greeting": b"\x01\x00" + bytes(62),
    "a page": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + b" " * 64,
    "another mechanism": zmtp.GREETING.replace(b"NULL ", b"PLAIN").replace(b"NULL\0", b"PLAIN"),
    "no READY": zmtp.GREETING + b"\x00\x05hello",
    "unknown flags": HELLO + b"\x80\x00",
    "one frame": HELLO + b"\x00\x05hello",
    "a body before the request": HELLO + b"\x01\x05hello",
    "frames without end": HELLO + b"\x01\x00" + b"\x01\x05hello",
    "a frame that is too large": HELLO + b"\x01\x00\x02" + (zmtp.DISCARD_FACTOR * LARGEST + 1).to_bytes(8, "big"),
    "a command that is too large": HELLO + b"\x06" + (2**20).to_bytes(8, "big"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_who_does_not_speak_zmtp_is_hung_up_on(served: Served, name: str) -> None:
    with connect(served, HOSTILE[name]) as peer:
        while peer.recv(4096):
            pass
    with Gr00tClient(served.ports["gr00t"]) as client:
        assert client.get_action(NESTED)[0]["action"].shape == (1, 3, 4)


def test_pings_are_answered(served: Served) -> None:
    with connect(served, HELLO + b"\x04\x09\x04PING\x00\x00xy") as peer:
        found = b""
        while not found.endswith(b"\x04\x07\x04PONGxy"):
            more = peer.recv(4096)
            assert more
            found += more


def test_more_peers_than_there_is_room_for_are_hung_up_on(toy_artifact: Path) -> None:
    with Served(toy_artifact, protocols=("gr00t",)) as served:
        with ExitStack() as stack:
            for _ in range(gr00t.CLIENTS):
                assert stack.enter_context(connect(served, HELLO)).recv(4096)
            more = stack.enter_context(connect(served, b""))
            assert more.recv(4096) == b""
        with Gr00tClient(served.ports["gr00t"]) as client:  # which tries again until there is room
            assert client.get_action(NESTED)[0]["action"].shape == (1, 3, 4)


def test_an_answer_that_nobody_reads_does_not_stop_the_others(served: Served) -> None:
    body = gr00t_packed({"endpoint": "ping"})
    silent = connect(served, HELLO + (b"\x01\x00\x00" + bytes((len(body),)) + body) * 20_000)
    with Gr00tClient(served.ports["gr00t"]) as client:
        assert client.get_action(NESTED)[0]["action"].shape == (1, 3, 4)
    silent.close()


def test_sigterm_ends_it_with_clients_connected(toy_artifact: Path) -> None:
    served = Served(toy_artifact, protocols=("gr00t",))
    with Gr00tClient(served.ports["gr00t"]) as client:
        client.get_action(NESTED)
        code, complaints = served.end()
    assert code == 0, complaints
    assert "Traceback" not in complaints


def test_numpy_files_are_read_as_numpy_reads_them() -> None:
    for array in (
        np.zeros((), np.float32),
        np.zeros((0, 3)),
        np.arange(6, dtype=">i2").reshape(1, 2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
    ):
        file = io.BytesIO()
        np.save(file, array)
        found = gr00t._decode_npy(file.getvalue())
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert found.shape == array.shape


def test_what_does_not_fit_is_refused(
    toy_artifact: Path, tiny_manifest: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec: PolicySpec = tiny_manifest.policy
    (tmp_path / "m.toml").write_text(MAPPING.replace("size = 3", "size = 4"))
    with pytest.raises(UserError, match=r"expected actions of 4 dimensions in the mapping .* found \[4, 1\]"):
        observations.load(tmp_path / "m.toml", spec)
    serve = ["serve", str(toy_artifact), "--port", "0", "--protocol", "gr00t"]
    text = 'state = [["s"]]\ninstruction = ["i"]\n[[cameras]]\nkey = ["i"]\nlayout = "HWC"\n'
    (tmp_path / "m.toml").write_text(text)
    assert cli.main([*serve, "--mapping", "gr00t", str(tmp_path / "m.toml")]) == 2
    assert 'expected keys such as ["video", "x"] in a mapping for gr00t, found' in capsys.readouterr().err
    assert cli.main([*serve, "--host", "0.0.0.0", "--token", "t"]) == 2
    assert "for 0.0.0.0, which other machines reach" in capsys.readouterr().err


BUILT_IN: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "gr00t-so100": ({"video": ("front", "wrist"), "state": {"single_arm": 5, "gripper": 1}}, (5, 1)),
    "gr00t-droid": (
        {"video": ("exterior_image_1_left", "wrist_image_left"), "state": {"joint_position": 7, "gripper_position": 1}},
        (7, 1),
    ),
    "gr00t-libero": (
        {
            "video": ("image", "wrist_image"),
            "state": dict.fromkeys(("x", "y", "z", "roll", "pitch", "yaw"), 1) | {"gripper": 2},
        },
        (1,) * 7,
    ),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_mappings(tiny_manifest: Any, name: str) -> None:
    keys, sizes = BUILT_IN[name]
    spec: PolicySpec = tiny_manifest.policy
    cameras = tuple(replace(spec.cameras[0], name=camera) for camera in ("first", "second"))
    names = tuple(f"d{number}" for number in range(sum(sizes)))
    meaning: Any = ("delta",) * len(names)
    action = replace(spec.action, names=names, meaning=meaning, units=("m",) * len(names))
    mapped = observations.load(name, replace(spec, cameras=cameras, action=action))
    parts, start = {}, 0.0
    for key, size in keys["state"].items():
        parts[key], start = np.arange(start, start + size), start + size
    assert mapped.mapping.instruction is not None
    words = {mapped.mapping.instruction[1]: WORDS}
    pictures = dict(zip(keys["video"], (PICTURE, PICTURE[::-1]), strict=True))
    found = mapped.convert({"video": pictures, "state": parts, "language": words})
    assert np.array_equal(found["image.first"], PICTURE)
    assert np.array_equal(found["image.second"], PICTURE[::-1])
    assert found["state"].tolist() == list(range(int(start)))
    assert found["instruction"] == WORDS
    assert tuple(columns.size for columns in mapped.mapping.actions) == sizes
    assert json.loads(json.dumps(mapped.description))


def test_the_log_has_no_tracebacks(toy_artifact: Path) -> None:
    served = Served(toy_artifact, protocols=("gr00t",))
    with Gr00tClient(served.ports["gr00t"]) as client:
        for message, _ in WRONG.values():
            client.send(message)
    for sent in HOSTILE.values():
        connect(served, sent).close()
    code, complaints = served.end()
    assert code == 0
    assert "Traceback" not in complaints
    assert "fault" not in complaints
