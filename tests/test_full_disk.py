"""A disk that is full: every writer ends in one line, leaves nothing half written, and nothing that was there is lost.

The disk is a limit on the size of files, which fails where a full disk does (EFBIG for ENOSPC) and needs no rights;
with the right to mount there is one of 64 KB too.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from subprocesses import environment

from families import DATA
from rlrc.errors import UserError
from rlrc.folders import replace_file, storage_failure, translate_storage_errors

ROOT = Path(__file__).parents[1]
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["rlrc", *sys.argv[2:]]
from rlrc.runtime.cli import main
sys.exit(main())
"""


def limited(size: int, *arguments: object) -> tuple[int, str]:
    """Exit code and complaint of a command whose files may have so many bytes."""
    command = [sys.executable, "-c", LIMITED, str(size), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    lines = [line for line in done.stderr.splitlines() if " so far" not in line and " of " not in line.split(":")[-1]]
    return done.returncode, "\n".join(lines)


QUIET = ["--evaluate", "0", "--threads", "1", "--workers", "1"]
OPENVLA = ["--hints", DATA / "openvla" / "golden.json", "--unnorm-key", "bridge_orig"]


@pytest.mark.parametrize(
    ("name", "size", "flags"), [("act", 20_000, []), ("openvla", 1_000, OPENVLA)], ids=["safetensors", "tokenizers"]
)
def test_a_stage_ends_in_one_line_and_leaves_nothing(tmp_path: Path, name: str, size: int, flags: list[object]) -> None:
    """By the library whose file is the first that is too large; both have exceptions of their own."""
    code, complaint = limited(size, "prune", DATA / name / "checkpoint", tmp_path / "out", "--lossless", *QUIET, *flags)
    assert code == 2, complaint
    # The tokenizer of an official folder is first converted in the system's folder for temporary files.
    place = re.escape(str(tmp_path / "out")) if name == "act" else "/[^,]*/tokenizer.json"
    line = f"rlrc: error: expected to write {place}, found: File too large; choose a disk, or a limit"
    assert re.match(line, complaint)
    assert str(DATA) not in complaint  # it is only read
    assert len(complaint.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["onnx", "gguf"])
def test_an_export_ends_in_one_line_and_the_artifact_stays(tiny_artifact: Path, tmp_path: Path, to: str) -> None:
    before = {file: file.read_bytes() for file in tiny_artifact.rglob("*") if file.is_file()}
    if to == "gguf":
        pytest.importorskip("llama_cpp")
    code, complaint = limited(9_000, "export", tiny_artifact, tmp_path / "out", "--to", to)
    assert (code, len(complaint.splitlines())) == (2, 1), complaint
    assert f"expected to write {tmp_path / 'out'}, found: " in complaint
    assert list(tmp_path.iterdir()) == []
    assert {file: file.read_bytes() for file in tiny_artifact.rglob("*") if file.is_file()} == before


def test_a_state_that_cannot_be_saved_leaves_the_one_before(tmp_path: Path) -> None:
    """torch's writer: two saves, the second larger than the disk."""
    code = """
import resource, sys, torch
from pathlib import Path
from rlrc.compressor.training.run_state import RunState
from rlrc.compressor.training.sft import SFTConfig
from rlrc.errors import UserError

run = RunState(Path(sys.argv[1]))
run.open("sft", "parent", SFTConfig())
run.save(1, weights=torch.ones(10))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    run.save(2, weights=torch.randn(100_000))
except UserError as error:
    print(error)
print(sorted(path.name for path in run.folder.iterdir()), run.load()["step"])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    told, kept = done.stdout.splitlines()
    assert told.startswith(f"expected to write {tmp_path / 'run' / 'state.pt'}, found: File too large")
    assert kept == "['precision.json', 'stage.json', 'state.pt'] 1"


WRITERS = """
import sys
from pathlib import Path
import numpy as np
from rlrc.datasets.meta import Feature
from rlrc.datasets.writer import Recording, write
from rlrc.errors import UserError

out, kind = Path(sys.argv[1]), sys.argv[2]
random = np.random.default_rng(0)
shape = (64, 64, 3)
frames = [{"observation.images.top": random.integers(0, 256, shape, np.uint8)} for _ in range(60)]
try:
    write(out, 10, {"observation.images.top": Feature(kind, shape)}, [Recording("push", frames)])
except UserError as error:
    print(error)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 64 KB, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_data_sets_by_pyarrow_and_av(small_disk: Path, kind: str) -> None:
    """libavformat ended the process where its file could not even be begun: the disk is full to the last page."""
    for room in (4096, 49_152):
        filling = small_disk / "filling"
        filling.write_bytes(b"x" * (65_536 - 8192 - room) if room > 4096 else b"")
        command = [sys.executable, "-c", WRITERS, str(small_disk / "out"), kind]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"expected to write {small_disk / 'out'}, found: No space left on device")
        assert sorted(path.name for path in small_disk.iterdir()) == ["filling"]


def test_a_video_that_could_not_be_begun_is_closed(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").symlink_to("/dev/full")
    code = """
import sys
from pathlib import Path
import numpy as np
from rlrc.datasets.video import VideoWriter
writer = VideoWriter(Path(sys.argv[1]), 10, 64, 64)
try:
    for _ in range(99):
        writer.append(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), True)
except OSError:
    print("told")
try:
    writer.close()
except OSError:
    pass
"""
    command = [sys.executable, "-c", code, str(tmp_path / "video.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        OSError("100000 requested and 12468 written"),
    ],
    ids=["system", "rust", "torch", "numpy"],
)
def test_what_libraries_say_of_a_full_disk(error: Exception, tmp_path: Path) -> None:
    assert storage_failure(error) == errno.ENOSPC
    wrapped = ValueError("while it was drawn")
    wrapped.__cause__ = error
    assert storage_failure(wrapped) == errno.ENOSPC
    with pytest.raises(UserError, match="found: No space left on device"), replace_file(tmp_path / "file") as partial:
        partial.write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(errno.ENOENT, "nothing there"), RuntimeError("(os error 2)")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    assert storage_failure(error) is None
    with pytest.raises(type(error)), translate_storage_errors(tmp_path):
        raise error


def test_the_journal_of_a_sensitivity(small_disk: Path, tiny_artifact: Path) -> None:
    (small_disk / "filling").write_bytes(b"x" * 65_536)
    out = small_disk / "out.json"
    command = [sys.executable, "-m", "rlrc.runtime.cli", "sensitivity", str(tiny_artifact), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2, done.stderr
    assert f"rlrc: error: expected to write {out}, found: No space left on device" in done.stderr
