"""Pictures in shared memory: the same actions, refusals of what is no memory of ours, and what does not fit."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import msgpack
import numpy as np
import pytest
from procfs import open_files
from serving import Served

from rlrc.errors import UserError
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.servers.client import RemotePolicy
from rlrc.runtime.servers.shared import Offered, Written
from rlrc.runtime.wire import arrays

PICTURES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


def test_actions_are_those_of_the_policy_in_this_process(toy_artifact: Path) -> None:
    state = np.array([0.1, 0.5, 1.0], np.float32)
    seen = [{"image.corner4": picture, "state": state, "instruction": "open"} for picture in PICTURES]
    expected = [LocalPolicy.load(toy_artifact).infer(one)["actions"] for one in seen]
    with (
        Served(toy_artifact) as served,
        RemotePolicy(f"ws://127.0.0.1:{served.ports['openpi']}", timeout_s=20, shared=True) as policy,
    ):
        for _ in range(2):
            for one, actions in zip(seen, expected, strict=True):
                np.testing.assert_allclose(policy.infer(one)["actions"], actions, rtol=0, atol=1e-6)
        policy.reset()  # another connection, another memory
        np.testing.assert_allclose(policy.infer(seen[0])["actions"], expected[0], rtol=0, atol=1e-6)
        with pytest.raises(NoAction, match=r"expected image.corner4 as uint8"):
            policy.infer({**seen[0], "image.corner4": PICTURES[0].astype(np.float32)})
        assert sum("memfd:rlrc" in file for file in open_files(served.process.pid)) <= 1


def test_arrays_lie_where_the_message_says() -> None:
    offered = Offered(2**16)
    written = Written(offered.path)
    given = {"a": PICTURES[0], "b": np.arange(400.0).reshape(20, 20), "small": np.arange(3.0), "large": np.zeros(2**17)}
    message = arrays.pack(given, written.place)
    assert len(message) > 2**17  # what does not fit goes with the message
    found = arrays.unpack(message, arrays.with_memory(offered.memory))
    for name, array in given.items():
        assert np.array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert len(arrays.pack({"a": PICTURES[0]}, written.place)) < 100
    offered.close()
    assert np.array_equal(found["b"], given["b"])  # still mapped
    for _ in range(100):
        written.clear()
        assert written.place(PICTURES[1]) == 0


@pytest.mark.parametrize("start", [-1, 2**16 - 8, 2**63, "0", True, None])
def test_what_lies_elsewhere_is_refused(start: object) -> None:
    offered = Offered(2**16)
    message = msgpack.packb({"x": {b"__shared__": start, b"dtype": "<f4", b"shape": [4]}})
    with pytest.raises(UserError, match="expected an array within 65536 bytes, found 16 at"):
        arrays.unpack(message, arrays.with_memory(offered.memory))
    huge = msgpack.packb({"x": {b"__shared__": 0, b"dtype": "<f4", b"shape": [2**40]}})
    with pytest.raises(UserError, match="expected an array within 65536 bytes"):
        arrays.unpack(huge, arrays.with_memory(offered.memory))
    offered.close()


def test_a_server_that_offers_no_memory_takes_none() -> None:
    message = arrays.pack({"x": PICTURES[0]}, lambda _: 0)
    assert arrays.unpack(message)["x"] == {b"__shared__": 0, b"dtype": "|u1", b"shape": [32, 32, 3]}  # no array


def test_nobody_can_cut_it_off() -> None:
    offered = Offered(2**16)
    descriptor = os.open(offered.path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
    offered.close()


def test_a_client_opens_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_bytes(b"x" * mmap.PAGESIZE)
    with file.open("r+b") as stream:
        for path in (str(file), f"/proc/{os.getpid()}/fd/{stream.fileno()}", "/proc/1/../../etc/passwd", None, 3):
            with pytest.raises(UserError, match="expected shared memory of a server on this machine"):
                Written(path)
    descriptor = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    with pytest.raises(UserError, match="one that may be cut off"):
        Written(f"/proc/{os.getpid()}/fd/{descriptor}")
    os.close(descriptor)
    assert file.read_bytes() == b"x" * mmap.PAGESIZE
