"""The page: complete, self-contained, escaped, and with the numbers it was given."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.benchmarks import charts, report, results
from rlrc.benchmarks.film import Strip
from rlrc.benchmarks.stats import percentiles
from rlrc.benchmarks.success import Episode
from rlrc.errors import UserError
from rlrc.runtime.cli import main

TASKS = ("drawer-open-v3", "drawer-open-v3/shared")


def row(name: str, size: int, milliseconds: float, success: float) -> dict[str, Any]:
    times = milliseconds * np.random.default_rng(0).lognormal(0, 0.1, 50)
    rate = {"success": success, "episodes": 100, "interval": [success - 0.05, min(1.0, success + 0.03)], "steps": 60.0}
    return {
        "name": name,
        "digest": name,
        "parameters": size // 2,
        "bytes": size,
        "precision": "fp32",
        "cpu_minutes": 3.0,
        "latency_ms": percentiles(times),
        "parts_ms": {part: percentiles(times / 4) for part in charts.PARTS},
        "trials_ms": times.tolist(),
        **rate,
        "hard": rate,
        "per_task": {task: rate for task in TASKS},
    }


@pytest.fixture
def measured() -> dict[str, Any]:
    return {
        "kind": "results",
        "command": "rlrc bench latency dense=a compressed=b",
        "machine": {"cpu": "A <fast> processor", "threads": 1, "versions": {"numpy": "2.0"}},
        "rows": [row("dense", 20_000_000, 10.0, 0.90), row("compressed", 2_000_000, 4.0, 0.92)],
    }


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects what would be fetched and every id."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.fetched.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def curves(folder: Path) -> Path:
    file = folder / "ppo.jsonl"
    lines = [{"stage": "rl", "step": i, "success": 0.5 + i / 200, "approx_kl": 0.01} for i in range(80)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def film() -> report.Film:
    frames = np.zeros((2, 96, 96, 3), np.uint8)
    strips = [
        Strip(name, Episode("drawer-open-v3", 1, name == "compressed", 80), frames, (0, 40))
        for name in ("pruned", "compressed")
    ]
    return report.Film(strips, "drawer-open-v3", "seed 1")


def test_page_is_complete_and_fetches_nothing(measured: dict[str, Any], tmp_path: Path) -> None:
    page = report.page([measured], report.read_curves([str(curves(tmp_path))]), film())
    read = Reader(page)
    assert read.fetched == []
    assert "script" not in read.tags
    assert not re.search(r"@import|url\((?!#)", page)  # SVG clip paths refer to #ids inside the page
    assert len(read.ids) == len(set(read.ids))
    for title in ("Results", "Latency", "Success", "Reinforcement learning", "Before and after", "How it was measured"):
        assert title in read.text
    assert read.tags.count("svg") == 4
    assert read.tags.count("img") == 4
    assert "10.0x less" in read.text  # 20 MB against 2 MB
    assert "2.5x faster" in read.text  # 10 ms against 4 ms
    assert "prefers-color-scheme: dark" in page
    assert "A <fast> processor" in read.text  # escaped in, and so read back whole


def test_names_are_escaped(measured: dict[str, Any]) -> None:
    measured["rows"][1]["name"] = "<script>alert(1)</script>"
    read = Reader(report.page([measured]))
    assert "script" not in read.tags
    assert "<script>alert(1)</script>" in read.text


def test_page_of_rows_without_trials_leaves_charts_out() -> None:
    page = report.page([{"rows": [{"name": "dense"}, {"name": "pruned", "parameters": 5}]}])
    assert Reader(page).tags.count("svg") == 0


def test_charts_follow_the_page(measured: dict[str, Any]) -> None:
    """Every colour is a variable that the style sheet defines for light, dark and paper."""
    svg = charts.latency({"dense": [1.0, 2.0], "compressed": [0.5, 0.6]}) + charts.success(measured["rows"])
    used = set(re.findall(r"var\((--[\w]+)\)", svg))
    assert {"--s0", "--s4", "--ink", "--line"} <= used
    assert not re.search(r"(?:fill|stroke): #", svg)
    assert not re.search(r'<svg [^>]*(?:width|height)="', svg)  # or it would not scale
    style = (Path(report.__file__).parent / "report.css").read_text()
    for variable, light in charts.PALETTE.items():
        values = re.findall(rf"{variable}: (#\w+);", style)
        assert len(values) == 3
        assert values[0] == values[2] == light


def test_ratios_by_hand(measured: dict[str, Any]) -> None:
    dense, compressed = report.table(results.merge([measured]))
    assert [below for _, below in dense[1:4]] == ["", "", ""]
    assert compressed[2] == ("2.00 MB", "10.0x less")
    assert compressed[5] == ("92.0%", "87.0 to 95.0")


def test_rows_of_several_files_are_joined_by_name() -> None:
    latency = {"rows": [{"name": "a", "digest": "1", "latency_ms": {"p50": 1.0}}]}
    success = {"rows": [{"name": "a", "digest": "1", "success": 0.5}, {"name": "b"}]}
    assert results.merge([latency, success]) == [
        {"name": "a", "digest": "1", "latency_ms": {"p50": 1.0}, "success": 0.5},
        {"name": "b"},
    ]
    with pytest.raises(UserError, match="one artifact under the name 'a'"):
        results.merge([latency, {"rows": [{"name": "a", "digest": "2"}]}])


def test_results_of_two_machines_are_not_joined(measured: dict[str, Any]) -> None:
    other = {"command": "rlrc bench success c", "machine": measured["machine"], "rows": [{"name": "pruned"}]}
    joined = results.join([measured, other])
    assert joined["command"] == "rlrc bench latency dense=a compressed=b; rlrc bench success c"
    assert [row["name"] for row in joined["rows"]] == ["dense", "compressed", "pruned"]
    with pytest.raises(UserError, match="results of one machine"):
        results.join([measured, {**other, "machine": {"cpu": "another", "cores": 8}}])


def test_curves_of_a_resumed_run_and_of_dagger(tmp_path: Path) -> None:
    folder = tmp_path / "seed-1"
    folder.mkdir()
    lines = [
        {"stage": "sft", "step": 50, "loss": 3.0, "samples": 9},
        {"stage": "sft", "step": 100, "loss": 2.0},
        {"stage": "dagger", "step": 100, "success": 0.5, "round": 0},
        {"stage": "sft", "step": 100, "loss": 2.5},  # again, after a kill
    ]
    (folder / "curve.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    expected = {"seed-1": {"loss": [(50.0, 3.0), (100.0, 2.5)], "success": [(100.0, 0.5)]}}
    assert report.read_curves([str(folder / "curve.jsonl")]) == {"sft": expected}
    assert list(report.read_curves([f"mine={folder / 'curve.jsonl'}"])["sft"]) == ["mine"]


@pytest.mark.parametrize("text", ["{", '{"step": 1}', "[1]", '{"stage": "sft", "step": "one"}'])
def test_a_file_that_is_no_curve_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=r"wrong\.jsonl"):
        report.read_curves([str(file)])


def test_smoothing_keeps_a_line_straight() -> None:
    straight = np.arange(100.0)
    smooth = charts._smooth(straight)
    assert smooth is not None
    np.testing.assert_allclose(smooth[2:-2], straight[2:-2])  # windows of 5 are cut short at the ends
    assert charts._smooth(straight[:59]) is None


def test_table_as_a_picture(measured: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    report.table_picture([measured], tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as image:
        assert image.width > 3 * image.height
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 2


def test_command_writes_page_and_joined_rows(measured: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    file, out, joined = tmp_path / "measured.json", tmp_path / "report.html", tmp_path / "reference.json"
    file.write_text(results.dump(measured))
    command = ["report", str(file), str(curves(tmp_path)), "--out", str(out), "--joined", str(joined)]
    assert main(command) == 0
    Reader(out.read_text())
    assert json.loads(joined.read_text())["rows"] == measured["rows"]
    assert main(command) == 2
    assert "already there" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("absent.json", None, "cannot be read"),
        ("broken.json", "{", "expected JSON"),
        ("list.json", "[]", '"rows"'),
        ("empty.json", '{"rows": []}', '"rows"'),
        ("curve.jsonl", "", "expected result files"),
    ],
)
def test_bad_results_are_one_line_and_exit_2(
    name: str, text: str | None, reason: str, tmp_path: Path, capsys: Any
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path / name), "--out", str(tmp_path / "report.html")]) == 2
    complaint = capsys.readouterr().err
    assert reason in complaint
    assert len(complaint.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_result_files_keep_their_values_on_short_lines(tmp_path: Path) -> None:
    result = {"kind": "x", "rows": [{"name": "a [b]", "trials": [1.5, 2.0], "nested": [[1, 2], [3]], "none": []}]}
    file = tmp_path / "result.json"
    results.write(file, results.dump(result))
    assert results.read(file) == result
    assert '"trials": [1.5, 2.0]' in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
