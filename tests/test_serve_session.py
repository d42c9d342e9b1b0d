"""What lies under all protocols: the guard over chunks, noise by client, mappings, arrays on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from guarded import ABSOLUTE, DELTA, at, guard_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc.artifact import CameraSpec, FlowSpec, PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.inference import policy as policies
from rlrc.runtime.safety.profile import Tracking
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.guarded import GuardedChunks
from rlrc.runtime.servers.session import Client, Session
from rlrc.runtime.servers.status import status
from rlrc.runtime.wire import arrays
from rlrc.runtime.wire.metrics import Metrics
from rlrc.runtime.wire.ports import Access, access, check_plain

# Ten steps a second, at most 1 m/s and 2 m/s2: from rest 0.02 m in the first step, 0.04 in the second, then 0.06.


def test_every_action_of_a_chunk_keeps_the_limits_from_where_the_robot_is() -> None:
    chunks = GuardedChunks(guard_of(ABSOLUTE))
    kept = chunks.apply(np.full((3, 1), 50, np.float32), at(7.0))
    np.testing.assert_allclose(kept[:, 0], [7.02, 7.06, 7.12], atol=1e-6)
    small = np.array([[3.01], [3.02], [3.03]], np.float32)
    assert np.array_equal(chunks.apply(small, at(3.0)), small)  # what keeps them is not changed


def test_a_chunk_does_not_lose_track_of_itself() -> None:
    tracked = replace(ABSOLUTE, tracking=Tracking(0.05, "s"))  # less than the chunk moves in all
    kept = GuardedChunks(guard_of(tracked)).apply(np.full((3, 1), 50, np.float32), at(7.0))
    np.testing.assert_allclose(kept[:, 0], [7.02, 7.06, 7.12], atol=1e-6)


def test_deltas_are_limited_too() -> None:
    kept = GuardedChunks(guard_of(DELTA)).apply(np.full((3, 1), 0.5, np.float32), at(0.0))
    np.testing.assert_allclose(kept[:, 0], [0.02, 0.04, 0.06], atol=1e-7)


@pytest.mark.parametrize(
    ("actions", "state"),
    [([[0.01], [np.nan]], [0.0]), ([[0.01]], [np.nan]), ([[0.01]], [200.0]), ([[0.01]], None), ([[0.0, 0.0]], [0.0])],
)
def test_what_does_not_do_gives_no_action_at_all(actions: Any, state: Any) -> None:
    chunks = GuardedChunks(guard_of(ABSOLUTE))
    with pytest.raises(UserError, match="expected"):
        chunks.apply(np.array(actions, np.float32), None if state is None else at(*state))


def test_a_stop_latches() -> None:
    chunks = GuardedChunks(guard_of(ABSOLUTE))
    with pytest.raises(UserError, match=r"found it stopped .*nan in x.*; check the robot"):
        chunks.apply(np.array([[np.nan]], np.float32), at(0.0))
    with pytest.raises(UserError, match="found it stopped"):
        chunks.apply(np.array([[0.01]], np.float32), at(0.0))


def test_it_is_rearmed_once_the_newest_chunk_would_pass() -> None:
    chunks = GuardedChunks(guard_of(ABSOLUTE))
    good, bad = np.array([[0.01]], np.float32), np.array([[np.nan]], np.float32)
    with pytest.raises(UserError):
        chunks.apply(bad, at(0.0))
    with pytest.raises(UserError, match=r"newest chunk and state to pass the guard, found: nan in x; send an obs"):
        chunks.rearm("the test")
    with pytest.raises(UserError, match="found it stopped"):
        chunks.apply(good, at(200.0))  # refused, but looked at
    with pytest.raises(UserError, match=r"found: .*within its limits"):
        chunks.rearm("the test")
    with pytest.raises(UserError, match="found it stopped"):
        chunks.apply(good, at(0.0))
    chunks.rearm("the test")
    assert np.array_equal(chunks.apply(good, at(0.0)), good)
    assert ("rearm", "the test (was stopped: nan in x)") in [(one.act, one.reason) for one in chunks.guard.events]


@pytest.mark.parametrize("guarded", [True, False])
def test_a_server_is_stopped_and_rearmed(arm_toy: Path, arm_spec: PolicySpec, guarded: bool) -> None:
    from rlrc.runtime.safety import profile
    from rlrc.runtime.safety.guard import Guard
    from rlrc.runtime.servers.refusal import RequestRefused

    assert arm_spec.state is not None
    limits = profile.load(Path(__file__).parents[1] / "examples/udp_arm.toml")
    guard = Guard(limits, 20, arm_spec.action, arm_spec.state.names, arm_spec.state.units)
    seen = {
        "image.corner4": np.zeros((32, 32, 3), np.uint8),
        "state": np.zeros(2, np.float32),
        "instruction": "open the drawer",
    }

    async def serve() -> None:
        session, told = Session(arm_spec, GuardedChunks(guard) if guarded else None), []
        session.show = lambda observation, actions, *_: told.append((observation["instruction"], actions is not None))
        await session.open(policies.LocalPolicy.load, (arm_toy,))
        with pytest.raises(UserError, match="expected a stopped server, found it running"):
            session.rearm("the test")
        client = session.client()
        await client.infer(seen)
        session.latch.stop("the test")
        assert status("/readyz", session, Access(), None)[:2] == (503, "stopped\n")
        with pytest.raises(RequestRefused, match=r"stopped.*the test"):
            await client.infer(seen)
        session.rearm("the test")
        session.instruction = "close the drawer"
        await client.infer(seen)
        assert told == [("open the drawer", True), ("open the drawer", False), ("close the drawer", True)]
        assert len(await session.bench(3)) == 3
        session.close()

    asyncio.run(serve())


def test_a_stop_from_another_thread_is_not_lost_in_a_rearm(tiny_spec: PolicySpec) -> None:
    """It comes while the guard is asked whether the newest chunk would pass."""

    async def play() -> None:
        class Slow(GuardedChunks):
            def rearm(self, reason: str) -> None:
                super().rearm(reason)
                session.latch.halt("HTTP")

        session = Session(tiny_spec, Slow(guard_of(ABSOLUTE)))
        session.inference.opened.set()
        session.latch.stop("the page")
        with pytest.raises(UserError, match="expected no stop during re-arming"):
            session.rearm("the test")
        assert session.latch.reason == "the page"
        session.latch.lost = "POST http://127.0.0.1:1/stop"
        with pytest.raises(UserError, match="expected every stop input to work, found POST http"):
            session.rearm("the test")

    asyncio.run(play())


def test_a_guarded_server_refuses_what_the_guard_stops(arm_toy: Path, arm_spec: PolicySpec) -> None:
    from rlrc.runtime.safety import profile
    from rlrc.runtime.safety.guard import Guard
    from rlrc.runtime.servers.refusal import RequestRefused

    assert arm_spec.state is not None
    limits = profile.load(Path(__file__).parents[1] / "examples/udp_arm.toml")
    guard = Guard(limits, 20, arm_spec.action, arm_spec.state.names, arm_spec.state.units)
    picture = np.zeros((32, 32, 3), np.uint8)

    async def serve() -> None:
        session = Session(arm_spec, GuardedChunks(guard))
        await session.open(policies.LocalPolicy.load, (arm_toy,))
        client = session.client()
        rest = {"image.corner4": picture, "state": np.zeros(2, np.float32), "instruction": "open the drawer"}
        free = policies.LocalPolicy.load(arm_toy).infer(rest)["actions"]
        chunk = await client.infer(rest)
        # At 20 Hz and 10 rad/s2 from rest: 0.025 rad, then 0.075, then 0.15, or the policy's where that is nearer.
        assert (np.abs(chunk.actions) <= np.array([[0.025], [0.075], [0.15]]) + 1e-6).all()
        assert np.abs(free).max() > 0.15
        with pytest.raises(RequestRefused, match=r"beyond 1\.5"):
            await client.infer({**rest, "state": np.array([2.0, 0.0], np.float32)})
        guard.stop("the test")
        with pytest.raises(RequestRefused, match=r"stopped .the test."):
            await client.infer(rest)
        assert status("/readyz", session, Access(), None) == (
            503,
            "stopped\n",
            "text/plain; charset=utf-8",
        )
        session.close()

    asyncio.run(serve())


def test_every_client_has_its_own_noise(tiny_manifest: Any) -> None:
    spec = replace(tiny_manifest.policy, flow=FlowSpec(2, 4))
    given: list[dict[str, Any]] = []

    class Told(Session):
        async def infer(self, observation: Any, *_: Any) -> Any:
            given.append(observation() if callable(observation) else observation)

    async def serve() -> None:
        session = Told(spec)
        one, other = Client(session), Client(session)
        for client in (one, one, other):
            await client.infer({})
        one.reset()
        await one.infer({})
        await one.infer({"noise": "mine"})

    asyncio.run(serve())
    random = np.random.default_rng(0)  # as LocalPolicy draws it
    first, second = (random.standard_normal((3, 4), np.float32) for _ in range(2))
    for found, expected in zip(given[:4], (first, second, first, first), strict=True):
        assert np.array_equal(found["noise"], expected)
    assert given[4]["noise"] == "mine"


@pytest.fixture(scope="session")
def tiny_spec(tiny_manifest: Any) -> PolicySpec:
    spec: PolicySpec = tiny_manifest.policy
    return spec


@pytest.fixture
def two_cameras(tiny_manifest: Any) -> PolicySpec:
    spec: PolicySpec = tiny_manifest.policy
    return replace(spec, cameras=tuple(replace(spec.cameras[0], name=name) for name in ("front", "wrist")))


HWC = np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)
BUILT_IN: dict[str, Callable[[], dict[str, Any]]] = {
    "libero": lambda: {
        "observation/image": HWC,
        "observation/wrist_image": HWC[::-1],
        "observation/state": np.arange(3.0),
        "prompt": "open",
    },
    "droid": lambda: {
        "observation/exterior_image_1_left": HWC,
        "observation/wrist_image_left": HWC[::-1],
        "observation/joint_position": np.arange(2.0),
        "observation/gripper_position": np.array([2.0]),
        "prompt": "open",
    },
    "aloha": lambda: {
        "images": {
            "cam_high": HWC.transpose(2, 0, 1),
            "cam_low": "not used",
            "cam_left_wrist": HWC[::-1].transpose(2, 0, 1),
        },
        "state": np.arange(3.0),
        "prompt": "open",
    },
    "openvla-oft": lambda: {
        "full_image": HWC,
        "wrist_image": HWC[::-1],
        "state": [0.0, 1.0, 2.0],
        "instruction": "open",
    },
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_mappings(two_cameras: PolicySpec, name: str) -> None:
    found = observations.load(name, two_cameras).convert(BUILT_IN[name]())
    assert np.array_equal(found["image.front"], HWC)
    assert np.array_equal(found["image.wrist"], HWC[::-1])
    assert found["state"].tolist() == [0, 1, 2]
    assert found["instruction"] == "open"


def test_openvla_takes_one_picture_and_words(tiny_manifest: Any) -> None:
    mapped = observations.load("openvla", replace(tiny_manifest.policy, state=None), "close")
    found = mapped.convert({"image": HWC})
    assert found.keys() == {"image.corner4", "instruction"}
    assert found["instruction"] == "close"
    assert mapped.convert({"image": HWC, "instruction": "open"})["instruction"] == "open"


def test_mappings_that_do_not_fit_are_refused(tiny_manifest: Any, two_cameras: PolicySpec, tmp_path: Path) -> None:
    spec: PolicySpec = tiny_manifest.policy
    third = (*two_cameras.cameras, CameraSpec("third", 32, 32, "none", (0,) * 3, (1,) * 3, "HWC"))
    cases = [
        ("openvla", spec, "expected keys of the state in the mapping openvla, found none"),
        (
            "libero",
            replace(two_cameras, cameras=third),
            "expected a key of camera third in the mapping libero, found none",
        ),
        ("nothing", spec, "expected a mapping .a TOML file, or one of own, aloha, droid"),
    ]
    for name, wanted, told in cases:
        with pytest.raises(UserError, match=told):
            observations.load(name, wanted)
    texts = {
        'state = [["s"]]\n[[cameras]]\nkey = ["i"]\nlayout = "HWC"\ncamera = "x"': "expected cameras among corner4",
        "cameras = []\nkeys = 1": "keys",
        "state = ": "expected TOML in",
    }
    for text, told in texts.items():
        (tmp_path / "m.toml").write_text(text)
        with pytest.raises(UserError, match=told):
            observations.load(tmp_path / "m.toml", spec)
    reordered = 'state = [["s"]]\ninstruction = ["i"]\n[[cameras]]\nkey = ["w"]\nlayout = "HWC"\ncamera = "wrist"\n'
    (tmp_path / "m.toml").write_text(reordered + '[[cameras]]\nkey = ["f"]\nlayout = "HWC"\n')
    found = observations.load(tmp_path / "m.toml", two_cameras).convert(
        {"w": HWC[::-1], "f": HWC, "s": [1.0], "i": "open"}
    )
    assert np.array_equal(found["image.front"], HWC)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "|u1", "<i8", "|b1"])
def test_arrays_survive_the_wire(dtype: str) -> None:
    for shape in ((), (0, 3), (2, 3)):
        array = np.ones(shape, dtype)
        found = arrays.unpack(arrays.pack({"a": array, "n": {"s": array.dtype.type(1)}}))
        assert found["a"].dtype == array.dtype
        assert np.array_equal(found["a"], array)
        assert found["a"].shape == shape
        assert found["n"]["s"] == 1


def test_arrays_are_written_as_openpi_does() -> None:
    written = msgpack.unpackb(arrays.pack({"a": np.array([[1.5, np.nan]], np.float32)}))
    assert written["a"] == {
        b"__ndarray__": True,
        b"data": b"\x00\x00\xc0\x3f\x00\x00\xc0\x7f",
        b"dtype": "<f4",
        b"shape": [1, 2],
    }
    for value in (np.array([object()]), np.array([1j]), np.array(["a"]), {1, 2}):
        with pytest.raises(UserError, match="expected numbers, text and arrays"):
            arrays.pack({"a": value})


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.count("n", protocol="openpi")
    metrics.count("n", protocol="openpi")
    metrics.observe("t", 0.003)
    metrics.observe("t", 9.0)
    lines = metrics.text(g=1.0).splitlines()
    assert 'n{protocol="openpi"} 2' in lines
    assert 't_bucket{le="0.002"} 0' in lines
    assert 't_bucket{le="0.005"} 1' in lines
    assert 't_bucket{le="+Inf"} 2' in lines
    assert {"t_sum 9.003", "t_count 2", "# TYPE t histogram", "g 1"} <= set(lines)


def test_who_may_connect() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        access(host, None, None, None, insecure=False)
    access("0.0.0.0", None, None, None, insecure=True)
    for host in ("0.0.0.0", "::", "192.168.0.2", "robot.local", ""):
        with pytest.raises(UserError, match="which other machines reach"):
            access(host, "t", None, None, insecure=False)
    secret = Access("t")
    assert [secret.allows(text) for text in ("Api-Key t", "Bearer t", "Basic t", "t", "Api-Key", None)] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["Bearer \udcff", "Bearer \ud800x", "Bearer \xe9", "Bearer", "", "Bearer  secret"])
def test_a_token_of_other_characters_is_another_token(given: str) -> None:
    assert not Access("secret").allows(given)


def test_protocols_without_tls_stay_on_this_machine() -> None:
    check_plain("127.0.0.1", ("gr00t", "lerobot"), insecure=False)
    check_plain("0.0.0.0", ("openpi", "openvla"), insecure=False)
    check_plain("0.0.0.0", ("gr00t",), insecure=True)
    with pytest.raises(UserError, match=r"--insecure with gr00t on 0.0.0.0, since GR00T's protocol has no TLS"):
        check_plain("0.0.0.0", ("openpi", "gr00t"), insecure=False)
    with pytest.raises(UserError, match=r"expected --host 127.0.0.1 with lerobot"):
        check_plain("0.0.0.0", ("lerobot",), insecure=True)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=16),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape", b"nd", "image.corner4", "state"]
            ),
            inner | st.sampled_from(["<f4", "|u1", "|O", [2, 2], [-1], [2**40], True]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(VALUES | st.binary(max_size=64))
def test_whatever_comes_is_an_observation_or_refused_in_words(tiny_spec: PolicySpec, value: Any) -> None:
    message = value if isinstance(value, bytes) else msgpack.packb(value)
    with suppress(UserError):  # any other error is one of ours
        observations.load("own", tiny_spec).convert(arrays.unpack(message))
