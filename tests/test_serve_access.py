"""Who may connect, and what is told: tokens, TLS keys, clients without TLS, URLs with IPv6 addresses."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ENVIRONMENT, Served

from rlrc.errors import UserError
from rlrc.runtime import cli
from rlrc.runtime.wire import ports

SERVE = [sys.executable, "-m", "rlrc.runtime.cli", "serve"]


@pytest.mark.parametrize("wrong", ["", " ", "a b", "secret\n", "secret\r", "\tsecret", "geheim\u00e4", "a\x00b"])
def test_what_is_no_token_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match="expected a token of ASCII characters without blanks in --token, found"
    ) as told:
        ports.token(wrong)
    assert "\n" not in str(told.value)
    assert "secret" not in str(told.value)
    assert "in --token, found " in str(told.value)
    if "\0" not in wrong:  # which no environment can have
        monkeypatch.setenv(ports.TOKEN, wrong)
        with pytest.raises(UserError, match=r"in RLRC_TOKEN, found .*; give another, or unset it"):
            ports.token(None)
    assert ports.token("right") == "right"  # the option goes first
    with pytest.raises(UserError, match="without blanks in --token"):
        ports.access("127.0.0.1", wrong, None, None, insecure=False)


def test_an_empty_token_does_not_open_the_server(arm_toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ports.TOKEN, "")
        for command in (["serve", str(arm_toy)], ["run", str(arm_toy), "--env", "metaworld:x-v3"]):
            assert cli.main([*command, "--port", "0"]) == 2
            assert "in RLRC_TOKEN, found an empty one" in capsys.readouterr().err
        patch.setenv(ports.TOKEN, "right")
        assert cli.main(["serve", str(arm_toy), "--port", "0", "--token", ""]) == 2
        assert "in --token, found an empty one" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with c.pem, k.pem, the same key encrypted as e.pem, and another's key as o.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("pem")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for key, certificate in (("k.pem", "c.pem"), ("o.pem", "oc.pem")):
        made = [*new, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key]
        subprocess.run([*made, "-out", certificate], cwd=folder, check=True, capture_output=True)
    encrypt = ["openssl", "pkey", "-in", "k.pem", "-aes256", "-passout", "pass:x", "-out", "e.pem"]
    subprocess.run(encrypt, cwd=folder, check=True, capture_output=True)
    (folder / "text.pem").write_text("no PEM at all")
    return folder


def test_an_encrypted_key_is_refused_without_a_question(arm_toy: Path, pem: Path) -> None:
    options = ["--port", "0", "--certificate", str(pem / "c.pem"), "--key", str(pem / "e.pem")]
    done = subprocess.run(
        [*SERVE, str(arm_toy), *options], env=ENVIRONMENT, input="x\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "expected a private key without a password, found an encrypted one in" in done.stderr
    assert "openssl pkey -in" in done.stderr
    assert "pass phrase" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("certificate", "key", "told"),
    [
        ("nothing.pem", "k.pem", r"expected a PEM file at .*nothing.pem, found: No such file"),
        ("c.pem", "nothing.pem", r"expected a PEM file at .*nothing.pem, found: No such file"),
        ("c.pem", "o.pem", "found .*c.pem and .*o.pem: key values mismatch"),
        ("text.pem", "k.pem", "expected a certificate and its key in PEM files, found .*text.pem"),
    ],
)
def test_files_that_are_no_certificate_and_key_are_named(pem: Path, certificate: str, key: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        ports.tls(pem / certificate, pem / key)


def test_a_client_without_tls_is_in_the_log(toy_artifact: Path, pem: Path) -> None:
    options = ["--certificate", str(pem / "c.pem"), "--key", str(pem / "k.pem"), "--mapping", "openvla", "openvla-oft"]
    served = Served(toy_artifact, *options, protocols=("openpi", "openvla"))
    opening = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n"
    for sent in (opening, opening, b"hello, is there anybody who speaks something?"):
        for port in served.ports.values():
            with socket.create_connection(("127.0.0.1", port), 8) as connection:
                connection.sendall(sent)
                try:
                    while connection.recv(4096):
                        pass
                except ConnectionError:
                    pass
    untrusting = ssl.create_default_context()
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", served.ports["openpi"]), 8) as plain:
        untrusting.wrap_socket(plain, server_hostname="127.0.0.1")
    trusting = ssl.create_default_context(cafile=pem / "c.pem")
    with socket.create_connection(("127.0.0.1", served.ports["openpi"]), 8) as plain:
        trusting.wrap_socket(plain, server_hostname="127.0.0.1").close()
    code, log = served.end()
    assert code == 0
    assert "found: http request; use wss:// or https:// in the client" in log
    assert "found: wrong version number; use wss:// or https://" in log
    assert "3 times more in " in log  # both ports, twice
    assert "unknown ca; check the certificates the client trusts" in log
    assert "Traceback" not in log


def test_urls_of_ipv6_addresses_have_brackets(arm_toy: Path) -> None:
    assert ports.url("ws", "::1", 8000) == "ws://[::1]:8000"
    assert ports.url("https", "robot.local", 1) == "https://robot.local:1"
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    from rlrc.runtime.servers.client import RemotePolicy

    served = Served(arm_toy, "--host", "::1", "--page", "0", protocols=("openpi", "gr00t"))
    with RemotePolicy(f"ws://[::1]:{served.ports['openpi']}", timeout_s=20) as policy:
        assert policy.metadata["server"] == "rlrc"
    assert served.page is not None
    assert served.page.startswith("http://[::1]:")
    assert served.lines[0].startswith(f"openpi: ws://[::1]:{served.ports['openpi']} ")
    assert served.lines[1].startswith(f"gr00t: tcp://[::1]:{served.ports['gr00t']} ")
    assert served.end()[0] == 0
