"""The remote policy against a real server: equal actions, refusals, time-outs, reconnection, TLS."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import Served, wait_for

from rlrc.errors import UserError
from rlrc.runtime import cli
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.servers.client import RemotePolicy

OBSERVATION = {
    "image.corner4": np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8),
    "state": np.array([0.1, 0.5, 1.0], np.float32),
    "instruction": "open the drawer",
}


def test_it_is_the_policy_elsewhere(toy_artifact: Path) -> None:
    expected = LocalPolicy.load(toy_artifact).infer(OBSERVATION)["actions"]
    with (
        Served(toy_artifact) as served,
        RemotePolicy(f"ws://127.0.0.1:{served.ports['openpi']}", timeout_s=20) as policy,
    ):
        for _ in range(3):
            result = policy.infer(OBSERVATION)
            np.testing.assert_allclose(result["actions"], expected, rtol=0, atol=1e-6)
        assert result["timing"]["decoder_ms"] > 0
        assert policy.metadata["horizon"] == 3
        latency = policy.latency()
        assert latency["calls"] == 3
        assert 0 < latency["p50_ms"] <= latency["p99_ms"] <= latency["max_ms"]
        with pytest.raises(NoAction, match=r"refused: expected image.corner4 in the observation"):
            policy.infer({"state": OBSERVATION["state"]})
        np.testing.assert_allclose(policy.infer(OBSERVATION)["actions"], expected, rtol=0, atol=1e-6)  # connects anew
        policy.reset()
        np.testing.assert_allclose(policy.infer(OBSERVATION)["actions"], expected, rtol=0, atol=1e-6)

        worker, policy.timeout_s = served.worker(), 0.3
        os.kill(worker, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(NoAction, match=r"has not answered within 0.3 s"):
            policy.infer({**OBSERVATION, "state": np.zeros(3, np.float32)})
        assert time.monotonic() - begun < 5
        os.kill(worker, signal.SIGCONT)
        policy.timeout_s = 20
        # The late answer, to another state, is not taken for that of this one.
        np.testing.assert_allclose(policy.infer(OBSERVATION)["actions"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("url", "options", "told"),
    [
        ("http://127.0.0.1:8000", {}, "expected a ws:// or wss:// URL and a timeout above 0 s"),
        ("ws://127.0.0.1:8000", {"timeout_s": float("nan")}, "found ws://127.0.0.1:8000 and nan"),
        ("ws://[::1", {}, "expected an openpi server at ws://[::1, found: "),
        ("ws://127.0.0.1:99999", {}, "expected an openpi server at ws://127.0.0.1:99999, found: "),
        (
            "ws://127.0.0.1:8000",
            {"token": "geheim\u00e4"},
            "expected a token of ASCII characters without blanks in token",
        ),
        (
            "ws://127.0.0.1:8000",
            {"token": "x\r\nHost: y"},
            "expected a token of ASCII characters without blanks in token",
        ),
        ("wss://127.0.0.1:8000", {"authority": Path("no.pem")}, "at no.pem, found: No such file"),
        ("wss://127.0.0.1:8000", {"authority": Path(__file__)}, "test_client.py, found: no certificate"),
    ],
)
def test_what_it_cannot_connect_with_is_told_in_one_line(url: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        RemotePolicy(url, connect_s=1, **options)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_server_that_was_started_again_is_found(toy_artifact: Path) -> None:
    first = Served(toy_artifact)
    port = first.ports["openpi"]
    with RemotePolicy(f"ws://127.0.0.1:{port}", timeout_s=20) as policy:
        expected = policy.infer(OBSERVATION)["actions"]
        first.end()
        with pytest.raises(NoAction, match="expected an openpi server at"):
            policy.infer(OBSERVATION)
        with Served(toy_artifact, port=port):
            assert np.array_equal(policy.infer(OBSERVATION)["actions"], expected)


def test_nobody_there_is_told() -> None:
    with pytest.raises(UserError, match=r"expected an openpi server at ws://127.0.0.1:1, found: .*; start the server"):
        RemotePolicy("ws://127.0.0.1:1")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_beyond_this_machine_needs_token_and_tls(
    toy_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    files = ["--certificate", str(certificate), "--key", str(key)]
    for options in ([], ["--token", "t"], files):
        assert cli.main(["serve", str(toy_artifact), "--host", "0.0.0.0", "--port", "0", *options]) == 2
        assert "expected --token, --certificate and --key for 0.0.0.0" in capsys.readouterr().err
    assert cli.main(["serve", str(toy_artifact), *files[:3], str(certificate)]) == 2
    assert "expected a certificate and its key in PEM files" in capsys.readouterr().err
    with Served(toy_artifact, "--host", "0.0.0.0", "--token", "t", *files) as served:
        url = f"wss://127.0.0.1:{served.ports['openpi']}"
        with RemotePolicy(url, token="t", timeout_s=20, authority=certificate) as policy:
            assert policy.infer(OBSERVATION)["actions"].shape == (3, 4)
        with pytest.raises(UserError, match="401"):
            RemotePolicy(url, authority=certificate)
        with pytest.raises(UserError, match="certificate verify failed"):
            RemotePolicy(url, token="t")
    wait_for(lambda: served.process.poll() is not None)
