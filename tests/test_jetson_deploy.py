"""Artifacts onto another machine: by the same code through a shell here, and by ssh where there is a server to try."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlrc import artifact as artifacts
from rlrc.errors import UserError
from rlrc.jetson.board import deploy
from rlrc.jetson.board.deploy import RemoteFolder, TrialFailed
from rlrc.jetson.board.remote import ConnectionLost, Shell
from rlrc.jetson.cli.deploy import Deploy, Rollback
from rlrc.runtime.cli import main

HERE = Shell(("sh", "-c"), "this machine")
SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
REPORTS = {
    "fine": {"findings": []},
    "ill": {"findings": [{"name": "goldens", "state": "fix", "found": "a flip"}]},
}


@pytest.fixture
def place(tmp_path: Path) -> RemoteFolder:
    return RemoteFolder(HERE, str(tmp_path / "robot's folder"), pause=lambda seconds: None)


@pytest.fixture
def checks(tmp_path: Path) -> dict[str, str]:
    """Commands that report as rlrc jetson doctor does, and end as it does."""
    for name, report in REPORTS.items():
        (tmp_path / name).write_text(f"echo copying >&2\necho '{json.dumps(report)}'\nexit {int(name == 'ill')}\n")
    return {name: f"sh {tmp_path}/{name}" for name in REPORTS}


@pytest.fixture
def two(make_toy: Callable[..., Path], toy_artifact: Path, tmp_path: Path) -> tuple[Path, Path]:
    other = make_toy(tmp_path / "other", parameters=1)
    return toy_artifact, other


def names(place: RemoteFolder) -> set[str]:
    root = Path(place.folder)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


def test_a_copy_is_whole_and_loads(toy_artifact: Path, place: RemoteFolder) -> None:
    artifact = deploy.load(toy_artifact)
    sent: dict[str, int] = {}
    digest = deploy.copy(artifact, place, lambda name, size: sent.update({name: size}))
    assert artifacts.load(Path(place.folder, "artifacts", digest)).digest == artifact.digest
    assert {name: sent[name] for name in artifact.manifest.files} == {
        name: spec.size for name, spec in artifact.manifest.files.items()
    }
    assert place.current() is None  # nothing uses it yet
    assert deploy.copy(artifact, place, lambda name, size: pytest.fail("sent again")) == digest


def test_what_is_there_is_not_sent_again(toy_artifact: Path, place: RemoteFolder) -> None:
    artifact = deploy.load(toy_artifact)
    golden = artifact.path / "golden.npz"
    begun = Path(place.folder, "incoming", artifact.digest[:16])
    begun.mkdir(parents=True)
    (begun / "golden.npz").write_bytes(golden.read_bytes()[:1000])
    sent: list[tuple[str, int]] = []
    deploy.copy(artifact, place, lambda name, size: sent.append((name, size)))
    assert [size for name, size in sent if name == "golden.npz"] == [1000, golden.stat().st_size]


def test_damage_on_the_way_is_found(toy_artifact: Path, place: RemoteFolder) -> None:
    """The first thousand bytes of an older copy are others; what is too long is begun anew."""
    artifact = deploy.load(toy_artifact)
    begun = Path(place.folder, "incoming", artifact.digest[:16])
    (begun / "graphs/onnx").mkdir(parents=True)
    (begun / "golden.npz").write_bytes(b"x" * 1000)
    (begun / "graphs/onnx/vision.onnx").write_bytes(b"x" * 10**6)
    digest = deploy.copy(artifact, place)
    artifacts.load(Path(place.folder, "artifacts", digest))


def test_damage_twice_is_an_error(toy_artifact: Path, place: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "_damaged", lambda *_: ["golden.npz"])
    with pytest.raises(UserError, match=r"golden.npz with its sha256, found another one twice"):
        deploy.copy(deploy.load(toy_artifact), place)
    assert place.digests() == set()


class Cut(Shell):
    """A connection that ends in the middle of a file, some times."""

    def __init__(self, times: int) -> None:
        super().__init__(("sh", "-c"), "the robot")
        self.left = times

    def send(self, command: str, source: Path, start: int, sent: Callable[[int], None]) -> None:
        """A third of the rest arrives; then the process there is killed, as sshd's is when the line is cut."""
        if not self.left or source.name != "golden.npz":
            super().send(command, source, start, sent)
            return
        self.left -= 1
        part = (source.stat().st_size - start) // 3
        script = f"tail -c +{start + 1} {source} | head -c {part} >> {command.partition('cat >> ')[2]}; kill -9 $$"
        assert subprocess.run(["sh", "-c", script], check=False).returncode == -signal.SIGKILL
        raise ConnectionLost("the line was cut")


def test_a_line_that_is_cut_is_taken_up(toy_artifact: Path, place: RemoteFolder) -> None:
    place.shell = Cut(2)
    sent: list[int] = []
    digest = deploy.copy(
        deploy.load(toy_artifact), place, lambda name, size: sent.append(size) if name == "golden.npz" else None
    )
    artifacts.load(Path(place.folder, "artifacts", digest))
    size = (toy_artifact / "golden.npz").stat().st_size
    first, second = size // 3, size // 3 + (size - size // 3) // 3
    assert sent == [0, first, second, size]  # where each try began, and what the last one came to


def test_a_line_that_stays_cut_is_told(toy_artifact: Path, place: RemoteFolder) -> None:
    place.shell = Cut(99)
    with pytest.raises(UserError, match="expected the robot to answer, found: the line was cut; run the same command"):
        deploy.copy(deploy.load(toy_artifact), place)
    assert place.digests() == set()
    place.shell = HERE
    deploy.copy(deploy.load(toy_artifact), place)  # and goes on


def test_a_full_disk_is_told_before(toy_artifact: Path, place: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "ROOM", 2**60)
    with pytest.raises(UserError, match=r"expected [\d,]+ bytes of room in .*, found [\d,]+; make some"):
        deploy.copy(deploy.load(toy_artifact), place)


def test_the_switch_is_one_rename(two: tuple[Path, Path], place: RemoteFolder) -> None:
    first, second = (deploy.copy(deploy.load(path), place) for path in two)
    deploy.switch(place, first)
    link = Path(place.folder, "current")
    assert (os.readlink(link), place.current()) == (f"artifacts/{first}", first)
    seen = set()

    def again() -> None:
        for digest in (second, first) * 8:
            deploy.switch(place, digest)

    with ThreadPoolExecutor() as pool:
        switching = pool.submit(again)
        while not switching.done():
            seen.add(artifacts.load(link, verify=()).digest[:16])  # raises if there ever is none, or half of one
        switching.result()
    assert seen <= {first, second}
    deploy.switch(place, second)
    assert place.current() == second


def test_deployed_tried_and_back(
    two: tuple[Path, Path],
    place: RemoteFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    checks: dict[str, str],
) -> None:
    first, second = (deploy.load(path) for path in two)
    report = tmp_path / "report.json"
    assert Deploy(two[0], "robot", check=checks["fine"], out=report).carry_out(first, place) == 0
    assert json.loads(report.read_text()) == {"findings": []}
    assert place.current() == first.digest[:16]
    assert place.verified() == [first.digest[:16]]
    # One that does not work there is there, but not in use.
    assert Deploy(two[1], "robot", check=checks["ill"]).carry_out(second, place) == 1
    assert "check failed: goldens: a flip; " in capsys.readouterr().err
    assert (place.current(), place.verified()) == (first.digest[:16], [first.digest[:16]])
    # A second try finds it copied, works, and is what a rollback goes back from.
    capsys.readouterr()
    assert Deploy(two[1], "robot", check=checks["fine"], json=True).carry_out(second, place) == 0
    assert json.loads(capsys.readouterr().out) == {
        "before": first.digest[:16],
        "current": second.digest[:16],
        "removed": [],
    }
    assert place.verified() == [first.digest[:16], second.digest[:16]]
    assert Rollback("robot", json=True).carry_out(place) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"before": second.digest[:16], "current": first.digest[:16]}
    assert place.current() == first.digest[:16]
    artifacts.load(Path(place.folder, "current"))


def test_the_doctors_bench_comes_home(toy_artifact: Path, place: RemoteFolder, tmp_path: Path) -> None:
    """By rlrc itself on the other side; the file is one that rlrc report reads."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    check = f"env PYTHONPATH='{path}' {sys.executable} -m rlrc.runtime.cli jetson doctor --trials 5"
    out = tmp_path / "board.json"
    assert Deploy(toy_artifact, "robot", check=check, out=out).carry_out(deploy.load(toy_artifact), place) == 0
    told = json.loads(out.read_text())
    assert {"name": "goldens on onnxruntime", "state": "ok"}.items() <= told["findings"][-1].items()
    assert len(told["rows"][0]["trials_ms"]) == 10  # whole blocks
    assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0


def test_without_an_earlier_one_there_is_no_way_back(
    toy_artifact: Path, place: RemoteFolder, checks: dict[str, str]
) -> None:
    Deploy(toy_artifact, "robot", check=checks["fine"]).carry_out(deploy.load(toy_artifact), place)
    with pytest.raises(UserError, match="expected an earlier verified artifact"):
        Rollback("robot").carry_out(place)


def test_a_service_that_does_not_start_goes_back(
    two: tuple[Path, Path],
    place: RemoteFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    checks: dict[str, str],
) -> None:
    first, second = (deploy.load(path) for path in two)
    assert Deploy(two[0], "robot", check=checks["fine"], after="true").carry_out(first, place) == 0
    starts = f"readlink '{tmp_path}/robot'\"'\"'s folder/current' >> {tmp_path}/starts"
    command = f"{starts}; test $(wc -l < {tmp_path}/starts) -gt 1"
    assert Deploy(two[1], "robot", check=checks["fine"], after=command).carry_out(second, place) == 1
    assert f"back to {first.digest[:16]}" in capsys.readouterr().err
    assert place.current() == first.digest[:16]
    started = [line.rpartition("/")[2] for line in (tmp_path / "starts").read_text().split()]
    assert started == [second.digest[:16], first.digest[:16]]  # with the new one, then again with the old one


def test_a_check_that_is_not_there_is_no_verdict(
    toy_artifact: Path, place: RemoteFolder, checks: dict[str, str]
) -> None:
    digest = deploy.copy(deploy.load(toy_artifact), place)
    with pytest.raises(UserError, match=r"expected a report of nowhere/rlrc on this machine, found: .*; install rlrc"):
        deploy.try_out(place, digest, "nowhere/rlrc")
    with pytest.raises(TrialFailed, match="a flip"):
        deploy.try_out(place, digest, checks["ill"])
    assert place.verified() == []


def test_old_ones_are_cleared(
    make_toy: Callable[..., Path], place: RemoteFolder, tmp_path: Path, checks: dict[str, str]
) -> None:
    digests = []
    for number in range(4):
        path = make_toy(tmp_path / f"toy{number}", parameters=number)
        Deploy(path, "robot", check=checks["fine"], keep=2).carry_out(deploy.load(path), place)
        digests.append(place.current())
    assert place.digests() == set(digests[-2:])
    assert place.verified() == digests[-2:]
    deploy.switch(place, str(digests[-2]))
    assert deploy.clear(place, 1) == []  # the current one stays, and the newest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "robot"], "expected an artifact folder at nowhere"),
        (["ART", "-oProxyCommand=x"], "Missing value for argument 'host'"),
        (["ART", "robot; rm"], "expected a host as ssh takes it, found 'robot; rm'"),
        (["ART", "robot", "--keep", "0"], "expected to keep at least one artifact"),
    ],
)
def test_refusals(toy_artifact: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["jetson", "deploy", *(str(toy_artifact) if text == "ART" else text for text in arguments)]) == 2
    assert message in capsys.readouterr().err


# By ssh


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A server on a port of the loopback with keys of its own: (host, the program with its options)."""
    if SSHD is None:
        pytest.skip("there is no sshd here")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    (tmp_path / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\n"
    )
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", tmp_path / "config"], stderr=subprocess.DEVNULL)
    host = f"{getpass.getuser()}@127.0.0.1"
    program = (
        f"ssh -p {port} -i {tmp_path}/user -o UserKnownHostsFile={tmp_path}/known -o StrictHostKeyChecking=accept-new"
    )
    deadline = time.monotonic() + 20
    try:
        while True:
            try:
                Shell.ssh(host, program).run("true")
                break
            except ConnectionLost:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield host, program
    finally:
        process.terminate()
        process.wait()


def test_over_ssh(
    toy_artifact: Path,
    tmp_path: Path,
    server: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    checks: dict[str, str],
) -> None:
    host, program = server
    folder = tmp_path / "robot's folder"
    artifact = deploy.load(toy_artifact)
    begun = folder / "incoming" / artifact.digest[:16]
    begun.mkdir(parents=True)
    (begun / "golden.npz").write_bytes((toy_artifact / "golden.npz").read_bytes()[:1000])
    command = [
        "jetson",
        "deploy",
        str(toy_artifact),
        host,
        "--folder",
        str(folder),
        "--ssh",
        program,
        "--check",
        checks["fine"],
    ]
    assert main([*command, "--out", str(tmp_path / "report.json")]) == 0, capsys.readouterr()
    assert artifacts.load(folder / "current").digest == artifact.digest
    assert json.loads((tmp_path / "report.json").read_text()) == {"findings": []}


def test_a_session_that_is_killed_goes_on(toy_artifact: Path, tmp_path: Path, server: tuple[str, str]) -> None:
    """By SIGKILL of the connection's own process on the server, while a file is on its way."""
    host, program = server
    place = RemoteFolder(Shell.ssh(host, program), str(tmp_path / "robot"), pause=lambda seconds: None)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1 << 20) * 48)
    place.run(f"mkdir -p {place.path()}")
    sent = [0]

    def watch(more: int) -> None:
        sent[0] += more
        if sent[0] == 4 << 20:
            _kill_sessions(tmp_path / "config")

    with pytest.raises(ConnectionLost):
        place.shell.send(f"cat >> {place.path('large')}", large, 0, watch)
    there = _settled(tmp_path / "robot/large")
    assert 0 <= there < large.stat().st_size
    place.retry(lambda: place.shell.send(f"cat >> {place.path('large')}", large, there, lambda more: None))
    assert (tmp_path / "robot/large").read_bytes() == large.read_bytes()


def _settled(file: Path) -> int:
    """Its size once the writer, which outlives its session, has written what was in its pipe."""
    size, before = file.stat().st_size, -1
    while size != before:
        time.sleep(0.5)
        size, before = file.stat().st_size, size
    return size


def _kill_sessions(config: Path) -> None:
    """The children of the server of this configuration."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if str(config) in Path(f"/proc/{parent}/cmdline").read_text():
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue
