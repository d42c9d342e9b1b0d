"""Checkpoints named as on the hub, against a hub that this test serves: what is downloaded, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from rlrc.compressor.checkpoints import hub
from rlrc.errors import UserError
from rlrc.runtime.cli import main

DATA = Path(__file__).parent / "data/act/checkpoint"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_NEEDED = ("modeling_prismatic.py", "pytorch_model.bin", "optimizer.pt", "lora_adapter/adapter_model.safetensors")


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub's API that snapshot_download asks for."""

    files: dict[str, bytes]
    asked: list[str]
    broken_after: int | None = None  # bytes of a file before the connection breaks, once

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0]).strip("/")
        if path.startswith("api/models/owner/gated"):
            return self.refuse(403, "GatedRepo")
        if not path.startswith(("api/models/owner/policy", "owner/policy/resolve/")):
            return self.refuse(404, "RepoNotFound")
        if path.startswith("api/"):
            revision = path.partition("/revision/")[2].split("/")[0] or "main"
            return self.describe(path) if revision in ("main", "v1", COMMIT) else self.refuse(404, "RevisionNotFound")
        name = path.split("/", 4)[4]
        self.asked.append(f"{self.command} {name}")
        if name not in self.files:
            return self.refuse(404, "EntryNotFound")
        self.send_file(self.files[name])

    def describe(self, path: str) -> None:
        listed: Any = [
            {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files.items()
        ]
        if "/tree/" not in path:
            listed = {"id": "owner/policy", "sha": COMMIT, "siblings": listed, "private": False, "tags": []}
        self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def send_file(self, data: bytes) -> None:
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0] or 0)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.asked[-1] += f" from {begin}" if begin else ""
        cut = type(self).broken_after
        if cut is not None and self.command == "GET" and len(data) > cut and not begin:
            type(self).broken_after = None
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[:cut])
            self.wfile.flush()
            self.connection.close()
            return
        self.answer(206 if begin else 200, data[begin:], headers)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", {"X-Error-Code": code})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    files = {path.name: path.read_bytes() for path in DATA.iterdir()} | dict.fromkeys(NOT_NEEDED, b"code")

    class Served(Hub):
        asked: list[str] = []  # noqa: RUF012

    Served.files = files
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    use(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield Served
    server.shutdown()
    server.server_close()
    thread.join()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """The library reads these once, when it is imported."""
    real = huggingface_hub.snapshot_download

    def download(name: str, **keywords: Any) -> str:
        return str(real(name, cache_dir=cache / "hub", endpoint=endpoint, token=False, max_workers=1, **keywords))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def test_only_what_is_needed_is_downloaded_and_only_once(served: type[Hub]) -> None:
    path = hub.locate("owner/policy")
    needed = {name for name in served.files if name not in NOT_NEEDED}
    assert {file.name for file in path.iterdir()} == needed
    assert all((path / name).read_bytes() == served.files[name] for name in needed)
    assert not [line for line in served.asked if line.split()[1] in NOT_NEEDED]
    assert path.name == COMMIT
    count = len([line for line in served.asked if line.startswith("GET")])
    assert hub.locate("owner/policy@v1") == path
    assert len([line for line in served.asked if line.startswith("GET")]) == count


def test_an_interrupted_download_resumes(served: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    served.broken_after = 105_000
    path = hub.locate("owner/policy")  # the library tries again by itself
    assert "GET model.safetensors from 100000" in served.asked
    assert (path / "model.safetensors").read_bytes() == served.files["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/nothing", "expected a folder or a repository of the hub with the name owner/nothing, found neither"),
        ("owner/policy@v2", "expected the revision v2 of owner/policy on the hub, found none"),
        ("owner/gated", "expected access to owner/gated on the hub, .*https://huggingface.co/owner/gated"),
    ],
)
def test_what_the_hub_does_not_have(served: type[Hub], name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hub.locate(name)


def test_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)  # nobody listens there
    observation, out = tmp_path / "obs.npz", tmp_path / "act.npz"
    np.savez(observation, state=np.zeros(6))
    for command in (["inspect", "owner/policy"], ["infer", "owner/policy", str(observation), "--out", str(out)]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "expected a folder at owner/policy or a connection to the hub to get owner/policy, found neither" in line


def test_offline_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="expected a folder at owner/policy or a connection"):
        hub.locate("owner/policy")


def test_what_was_downloaded_serves_without_a_connection(
    served: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hub.locate("owner/policy")
    monkeypatch.undo()
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert hub.locate("owner/policy") == path


def test_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/policy").mkdir(parents=True)
    assert hub.locate("owner/policy") == Path("owner/policy")
    for other in ("policy", "a/b/c", "/nowhere/policy", "../policy@main", "./policy"):  # no names of the hub
        assert hub.locate(other) == Path(other)
