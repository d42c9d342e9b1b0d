"""The operator's page over HTTP, without a browser: of a loop that moves an arm, and of a server."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driven import Running
from PIL import Image
from procfs import children, open_files
from serving import Served, wait_for

from rlrc.runtime.cli import main
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.page.feed import SLOT, Feed, FeedReader
from rlrc.runtime.page.metadata import EventFilter, list_plots
from rlrc.runtime.safety.verdict import Event
from rlrc.runtime.servers.client import RemotePolicy

pytest.importorskip("aiohttp", reason="the page needs the extra serve")


class Browser:
    """What a browser would ask, by the printed link."""

    def __init__(self, link: str) -> None:
        self.url, self.token = link.split("/#")

    def ask(self, path: str, body: Any = None, token: str | None = None, **headers: str) -> tuple[int, bytes, Any]:
        """-> status, body, headers; POST with a body."""
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"} | headers
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data=data, headers=headers)
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        status, answer, _ = self.ask(path, {} if body is None else body)
        return status, json.loads(answer)

    def news(self, messages: int = 2) -> list[tuple[str, Any]]:
        """The first server-sent events: their names, and what they say."""
        request = urllib.request.Request(f"{self.url}/events", headers={"Authorization": f"Bearer {self.token}"})
        found: list[tuple[str, Any]] = []
        with urllib.request.urlopen(request, timeout=30) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            while len(found) < messages:
                kind, data, _ = (response.readline().decode() for _ in range(3))
                found.append((kind.removeprefix("event: ").strip(), json.loads(data.removeprefix("data: "))))
        return found

    @property
    def state(self) -> Any:
        return self.news(1)[0][1]["state"]


@pytest.fixture(scope="module")
def running(arm_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run = Running(arm_toy, tmp_path_factory.mktemp("run"), "--port", "0", "--rearm")
    yield run
    run.process.send_signal(signal.SIGTERM)
    run.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser(running: Running) -> Browser:
    assert running.process.stdout is not None
    line = running.process.stdout.readline()
    assert line.startswith("page: ")
    return Browser(line.split()[1])


def test_the_page_is_sent_with_a_strict_policy_and_nothing_from_elsewhere(browser: Browser) -> None:
    for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript"), ("/icon.svg", "svg")):
        status, body, headers = browser.ask(path, token="")
        assert status == 200
        assert kind in headers["Content-Type"]
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "Server" not in headers
        found = re.findall(rb"""https?://(?!www\.w3\.org/2000/svg)|<script>|style=|onclick|innerHTML|eval\(""", body)
        assert not found


@pytest.mark.parametrize("path", ["/events", "/camera/0", "/stop"])
def test_what_it_shows_needs_the_token(browser: Browser, path: str) -> None:
    assert browser.ask(path, token="")[0] == 401
    assert browser.ask(path, token=browser.token + "x")[0] == 401


@pytest.mark.parametrize("path", ["/stop", "/rearm", "/instruction", "/bench"])
def test_what_it_does_needs_the_token(browser: Browser, path: str) -> None:
    assert browser.ask(path, {}, token="")[0] == 401
    assert browser.state["stopped"] is None


def test_news_of_the_loop(browser: Browser) -> None:
    (first, hello), *rest = browser.news(6)
    assert first == "hello"
    assert {kind for kind, _ in rest} == {"news"}
    assert hello["name"] == "arm_toy"
    assert hello["deadline_ms"] == pytest.approx(50)
    assert [row["name"] for row in hello["rows"]] == ["shoulder", "elbow"]
    assert hello["rows"][0] | {"name": ""} == {
        "name": "",
        "unit": "rad",
        "command": 0,
        "state": 0,
        "factor": 1.0,
        "low": -1.5,
        "high": 1.5,
    }
    assert hello["state"]["instruction"] == "wave"
    steps = [step for _, told in rest for step in told["steps"]]
    assert len(steps) > 4
    assert np.diff([step[0] for step in steps]).min() > 0.02  # each of them once, at 20 Hz
    assert len(steps[0][5]) == len(steps[0][6]) == 2


def test_live_pictures(browser: Browser) -> None:
    status, first, headers = browser.ask("/camera/0")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.size == (32, 32)
    status, _, later = browser.ask(f"/camera/0?after={headers['X-Number']}")
    assert status == 200
    assert int(later["X-Number"]) > int(headers["X-Number"])
    assert browser.ask("/camera/1")[0] == 404
    assert browser.ask("/camera/0?after=x")[0] == 404


def test_other_words(browser: Browser) -> None:
    assert browser.post("/instruction", {"text": " close\nit "}) == (200, {})
    wait_for(lambda: browser.state["instruction"] == "close it")
    assert browser.post("/instruction", {"text": None}) == (200, {})
    wait_for(lambda: browser.state["instruction"] == "wave")
    assert browser.post("/instruction", {"text": "x" * 501})[0] == 400
    assert browser.post("/instruction", {"words": "x"})[0] == 400
    assert browser.post("/instruction", ["x"])[0] == 400


def test_stop_bench_and_rearm(browser: Browser, running: Running) -> None:
    assert browser.post("/rearm", {"reason": ""})[0] == 409  # it moves
    assert browser.post("/bench")[0] == 409
    assert browser.post("/stop") == (200, {"stopped": True, "reason": "the page"})
    wait_for(lambda: browser.state["resting"])
    assert json.loads(browser.ask("/stop")[1]) == {"stopped": True, "reason": "asked to stop: the page"}
    status, told = browser.post("/bench")
    assert status == 200
    assert 0 < told["p50_ms"] <= told["p99_ms"] <= told["max_ms"]
    assert browser.post("/rearm", {"reason": "cleared the table"}) == (200, {})
    wait_for(lambda: browser.state["stopped"] is None)
    events = browser.news(1)[0][1]["events"]
    assert "re-armed" not in str(events[0])
    assert any(act == "rearm" and "the page (cleared the table)" in text for _, act, text in events)
    assert running.process.poll() is None


def test_who_connects_and_says_nothing_is_dropped(browser: Browser) -> None:
    address = ("127.0.0.1", int(browser.url.rpartition(":")[2]))
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(100)]
        silent += [stack.enter_context(socket.create_connection(address)) for _ in range(5)]
        for one in silent[-5:]:
            one.send(b"POST /stop HTTP/1.1\r\nHost: x\r\n")  # and nothing more
        begun = time.monotonic()
        assert browser.ask("/stop")[0] == 200  # meanwhile
        for one in silent:
            one.settimeout(20)
            with suppress(ConnectionResetError):  # what it had sent was not read any more
                assert one.recv(1) == b""
        assert time.monotonic() - begun < 15
    assert browser.state["stopped"] is None


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_page_over_tls(arm_toy: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    options = ["--page", "0", "--token", "mine", "--certificate", str(certificate), "--key", str(key)]
    with Served(arm_toy, *options) as served:
        assert served.page is not None
        assert served.page.startswith("https://127.0.0.1:")
        assert served.page.endswith("/#mine")
        headers = {"Authorization": "Bearer mine"}
        request = urllib.request.Request(served.page.split("#")[0] + "stop", headers=headers)
        trusted = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(request, timeout=20, context=trusted) as response:
            assert json.load(response) == {"stopped": False, "reason": ""}


@pytest.mark.parametrize(("code", "what"), [("spawn_main", "the page http"), ("stop_listener", "POST http")])
def test_a_page_or_a_stop_that_is_killed_stops_the_robot(arm_toy: Path, tmp_path: Path, code: str, what: str) -> None:
    run = Running(arm_toy, tmp_path, "--port", "0")
    pids = [pid for pid in children(run.process.pid) if is_listening(pid)]
    found = [pid for pid in pids if code in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)
    printed, complaints = run.process.communicate(timeout=60)
    assert run.process.returncode == 1
    assert f"stopped: lost {what}://127.0.0.1:" in complaints + printed


def is_listening(pid: int) -> bool:
    """Inference does not."""
    sockets = {file[8:-1] for file in open_files(pid) if file.startswith("socket:[")}
    listening = {
        line.split()[9] for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:] if " 0A " in line
    }
    return bool(sockets & listening)


def test_a_stop_over_http_ends_a_run_without_rearm(arm_toy: Path, tmp_path: Path) -> None:
    run = Running(arm_toy, tmp_path, "--port", "0")
    assert run.process.stdout is not None
    browser = Browser(run.process.stdout.readline().split()[1])
    assert browser.post("/stop")[0] == 200
    printed, rows = run.end()
    assert "asked to stop: the page" in printed
    assert rows[-1]["stopped"]


@pytest.mark.timing
def test_a_frozen_page_keeps_nobody_from_stopping(arm_toy: Path, tmp_path: Path) -> None:
    run = Running(arm_toy, tmp_path, "--port", "0")
    assert run.process.stdout is not None
    link = run.process.stdout.readline().split()[1]
    browser = Browser(link)
    own = Browser(f"http://127.0.0.1:{browser.news(1)[0][1]['stop']}/#{browser.token}")
    pids = [pid for pid in children(run.process.pid) if is_listening(pid)]
    page = next(pid for pid in pids if "stop_listener" not in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(page, signal.SIGSTOP)  # as if it were kept busy for ever
    assert own.post("/stop") == (200, {"stopped": True, "reason": "HTTP"})
    printed, rows = run.end()
    assert "asked to stop: HTTP" in printed
    assert rows[-1]["stopped"]


def test_a_port_that_is_taken_is_told(running: Running, browser: Browser, arm_toy: Path, tmp_path: Path) -> None:
    port = browser.url.rpartition(":")[2]
    command = [sys.executable, "-m", "rlrc.runtime.cli", "serve", str(arm_toy), "--port", "0", "--page", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"expected a free port for the page on 127.0.0.1, found {port}: Address already in use" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "0", "--host", "0.0.0.0"], "expected --token, --certificate and --key for 0.0.0.0"),
        (["--port", "0", "--token", "a b"], "a token of ASCII characters without blanks"),
        (["--port", "0", "--certificate", "c.pem"], "expected both --certificate and --key"),
        (["--stop-port", "8766"], "expected --port with --stop-port"),
    ],
)
def test_a_page_for_others_is_protected(
    arm_toy: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["run", str(arm_toy), "--env", "metaworld:drawer-open-v3", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_stop_port_without_a_page_is_refused(arm_toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(arm_toy), "--stop-port", "8766"]) == 2
    assert "expected --page with --stop-port" in capsys.readouterr().err


def test_the_page_of_a_server(arm_toy: Path) -> None:
    profile = Path(__file__).parents[1] / "examples/udp_arm.toml"
    observation = {
        "image.corner4": np.full((32, 32, 3), 200, np.uint8),
        "state": np.zeros(2, np.float32),
        "instruction": "open the drawer",
    }
    with Served(arm_toy, "--page", "0", "--profile", str(profile), "--hz", "20", "--log", "json") as served:
        assert served.page is not None
        browser = Browser(served.page)
        with RemotePolicy(f"ws://127.0.0.1:{served.ports['openpi']}", timeout_s=20) as policy:
            browser.ask("/camera/0")  # somebody looks
            policy.infer(observation)
            with Image.open(io.BytesIO(browser.ask("/camera/0")[1])) as picture:
                assert np.abs(np.asarray(picture).astype(int) - 200).max() < 3
            hello = browser.news(1)[0][1]
            assert hello["deadline_ms"] == pytest.approx(150)  # three actions at 20 Hz
            assert len(hello["steps"]) == 1
            assert browser.post("/bench")[1]["calls"] == 50
            assert browser.post("/rearm", {"reason": "x"}) == (
                409,
                {"error": "expected a stopped server, found it running; stop it first"},
            )
            assert browser.post("/stop")[0] == 200
            with pytest.raises(NoAction, match=r"found it stopped .the page."):
                policy.infer(observation)
            assert served.get("/readyz") == (503, "stopped\n")
            assert browser.post("/rearm", {"reason": "all clear"}) == (200, {})
            policy.infer(observation)
            wait_for(lambda: any(act == "rearm" for _, act, _ in browser.news(1)[0][1]["events"]))
            own = Browser(f"http://127.0.0.1:{hello['stop']}/#{browser.token}")  # the stop's port, without the page
            assert own.post("/stop", {"x": 1}) == (200, {"stopped": True, "reason": "HTTP"})
            assert own.ask("/events")[0] == 404
            with pytest.raises(NoAction, match=r"found it stopped .HTTP."):
                policy.infer(observation)
            assert browser.state["stopped"] == "HTTP"
            assert browser.post("/rearm", {"reason": "again"}) == (200, {})
            listener = [pid for pid in children(served.process.pid) if b"stop_listener" in read(f"/proc/{pid}/cmdline")]
            os.kill(listener[0], signal.SIGKILL)
            wait_for(lambda: str(browser.state["stopped"]).startswith("lost POST http://127.0.0.1:"))
            with pytest.raises(NoAction, match="lost POST"):
                policy.infer(observation)
            assert "expected every stop input to work" in browser.post("/rearm", {"reason": "x"})[1]["error"]
        code, complaints = served.end()
    assert code == 0
    records = [json.loads(line) for line in complaints.splitlines()]
    assert {"time", "level", "logger", "message"} <= records[0].keys()
    assert "re-armed by the page (all clear) (was stopped: the page)" in [one["message"] for one in records]
    refused = next(one for one in records if one.get("outcome") == "guard")
    assert (refused["protocol"], refused["client"]) == ("openpi", "127.0.0.1")


def read(path: str) -> bytes:
    return Path(path).read_bytes()


# The feed between the processes


def test_a_page_that_does_not_read_loses_steps_but_no_events() -> None:
    feed = Feed(())
    mirror = FeedReader(feed.ends)
    event = (0.0, "stop", "the reason")
    for step in range(5000):
        feed.show({"step": step}, [event] if step == 4000 else ())
    assert feed.lost > 0
    mirror.socket.setblocking(False)
    while True:  # it reads again
        try:
            mirror.socket.recv(2**16)
        except BlockingIOError:
            break
    feed.show({"step": 5000})
    assert b"the reason" in mirror.socket.recv(2**16)
    feed.close()
    assert mirror.socket.recv(2**16) == b""
    mirror.socket.close()


def test_pictures_are_copied_for_those_who_look_and_thinned_out_if_they_are_large() -> None:
    feed = Feed(("front", "wrist"))
    mirror = FeedReader(feed.ends)
    large = np.arange(960 * 1280 * 3, dtype=np.uint32).astype(np.uint8).reshape(960, 1280, 3)
    small = large[:48, :64].copy()
    seen = {"image.front": large, "image.wrist": small}
    mirror.socket.setblocking(False)
    feed.picture(seen)
    with pytest.raises(BlockingIOError):
        mirror.socket.recv(2**16)
    mirror.set_watched(True)
    import msgpack

    for _ in range(3):  # the third time none is due
        feed.picture(seen)
    told = [msgpack.unpackb(mirror.socket.recv(2**16)) for _ in range(2)]
    assert [one["picture"] for one in told] == [0, 1]
    assert np.array_equal(mirror.picture(told[0]["slot"], told[0]["shape"]), large[::2, ::2])
    assert large[::2, ::2].nbytes <= SLOT
    assert np.array_equal(mirror.picture(told[1]["slot"], told[1]["shape"]), small)
    with pytest.raises(BlockingIOError):
        mirror.socket.recv(2**16)
    feed.close()
    mirror.socket.close()


def test_clamps_are_told_once_a_second() -> None:
    events, clamp = EventFilter(), Event(3, "velocity", "clamp", "", "elbow", 2.0, 1.0)
    other, stop = clamp._replace(dimension="shoulder"), Event(4, "stop", "stop", "a key")
    assert [len(events.format([clamp, other, stop], now)) for now in (0.0, 0.5, 1.1)] == [3, 1, 3]
    assert events.format([stop], 2.0) == [(2.0, "stop", "step 4: stop: a key")]


def test_what_is_plotted(tiny_manifest: Any) -> None:
    """Deltas are measured by nothing: the state has plots of its own."""
    rows = list_plots(tiny_manifest.policy, None)
    spec = tiny_manifest.policy
    assert [row["name"] for row in rows] == [*spec.action.names, *spec.state.names]
    assert [row["command"] for row in rows] == [*range(spec.action.dim), *[None] * len(spec.state.names)]


def test_the_page_is_no_part_of_the_loops_imports() -> None:
    code = "import sys, rlrc.runtime.cli.run, rlrc.runtime.cli.serve; sys.exit('aiohttp' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
