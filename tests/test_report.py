"""The page: complete, self-contained, escaped, and with the numbers it was given."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.benchmarks.measure.success import ScoredEpisode
from rlrc.benchmarks.report import charts, findings, html, limits, markdown, report, tradeoffs
from rlrc.benchmarks.report.film import Strip
from rlrc.benchmarks.results import results
from rlrc.benchmarks.results.stats import percentiles
from rlrc.errors import UserError
from rlrc.runtime.cli import main

TASKS = ("drawer-open-v3", "drawer-open-v3/shared")


def row(name: str, size: int, milliseconds: float, success: float) -> dict[str, Any]:
    times = milliseconds * np.random.default_rng(0).lognormal(0, 0.1, 50)
    parts = percentiles((times / 4).tolist())
    rate = {"success": success, "episodes": 100, "interval": [success - 0.05, min(1.0, success + 0.03)], "steps": 60.0}
    return {
        "name": name,
        "digest": name,
        "parameters": size // 2,
        "bytes": size,
        "precision": "fp32",
        "cpu_minutes": 3.0,
        "latency_ms": percentiles(times.tolist()),
        "parts_ms": dict.fromkeys(("preprocess", "vision", "prefill", "postprocess"), parts),
        "trials_ms": times.tolist(),
        "block": 5,
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


def page(*arguments: Any) -> str:
    return html.page(report.document(*arguments))


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
        Strip(name, ScoredEpisode("drawer-open-v3", 1, name == "compressed", 80), frames, (0, 40))
        for name in ("pruned", "compressed")
    ]
    return report.Film(strips, "drawer-open-v3", "seed 1")


def test_page_is_complete_and_fetches_nothing(measured: dict[str, Any], tmp_path: Path) -> None:
    written = page([measured], report.read_curves([str(curves(tmp_path))]), film())
    read = Reader(written)
    assert read.fetched == []
    assert "script" not in read.tags
    assert not re.search(r"@import|url\((?!#)", written)  # SVG clip paths refer to #ids inside the page
    assert len(read.ids) == len(set(read.ids))
    for title in ("Results", "Latency", "Success", "Reinforcement learning", "Before and after", "How it was measured"):
        assert title in read.text
    assert read.tags.count("svg") == 6  # memory, latency twice, bytes against success, success, curves
    assert read.tags.count("img") == 4
    assert "10.0x less" in read.text  # 20 MB against 2 MB
    assert "2.5x faster" in read.text  # 10 ms against 4 ms
    assert "prefers-color-scheme: dark" in written
    assert "A <fast> processor" in read.text  # escaped in, and so read back whole


def test_names_are_escaped(measured: dict[str, Any]) -> None:
    measured["rows"][1]["name"] = "<script>alert(1)</script>"
    read = Reader(page([measured]))
    assert "script" not in read.tags
    assert "<script>alert(1)</script>" in read.text


def test_page_of_rows_without_trials_leaves_charts_out() -> None:
    written = page([{"rows": [{"name": "dense"}, {"name": "pruned", "parameters": 5}]}])
    assert Reader(written).tags.count("svg") == 0


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


def geometry(**changes: Any) -> dict[str, Any]:
    """The claims of a geometry, as `rlrc bench claims --geometry` writes them: what the report reads of it."""

    def arm(precision: str, size: int, factor: float) -> dict[str, Any]:
        parts = {"vision": 300.0, "prefill": 2000.0, "decode": 900.0}
        return {
            "precision": precision,
            "bytes": size,
            "peak_rss": size,
            "parameters": size // 2,
            "latency_ms": {"p50": 3200 * factor, "p90": 3300 * factor, "p99": 3400 * factor},
            "parts_ms": {name: {"p50": ms * factor, "p90": 1.1 * ms * factor} for name, ms in parts.items()},
            "roofline": {
                name: {"limit_ms": ms * factor / 2, "measured_ms": ms * factor, "share": 0.5, "bound": "products"}
                for name, ms in parts.items()
            },
        }

    checks = [
        {"claim": "memory", "verdict": "PASS", "value": 9.1, "limit": None, "threshold": 8.0, "reason": "bytes"},
        {"claim": "latency", "verdict": "FAIL", "value": 2.0, "limit": 1.9, "threshold": 2.3, "reason": "8 actions"},
    ]
    return {
        "kind": results.GEOMETRY,
        "geometry": "openvla-7b",
        "runtime": "gguf",
        "threads": 2,
        "dense": arm("fp16", 15_000_000_000, 1.0),
        "compressed": arm("vision int4a8, embed int4a8, head int4a8, decoder int4", 1_600_000_000, 0.2),
        "verdict": "FAIL",
        "command": "rlrc bench claims --geometry openvla-7b",
        "machine": {"cpu": "A", "cores": 2, "threads": 2, "versions": {"numpy": "2.0"}},
        "pruned": {"intermediate_heads": 0.9},
        "instruction_tokens": 20,
        "roofline": {"read_gb_s": 40.0, "products_gop_s": {"fp32": 300.0, "int8": 2000.0}},
        "checks": checks,
        **changes,
    }


def test_claims_of_a_geometry_stand_apart_from_the_table(measured: dict[str, Any]) -> None:
    read = Reader(page([measured, geometry()]))
    assert "openvla-7b on gguf" in read.text
    assert "9.10x" in read.text
    assert "1.90x or more" in read.text
    assert "15.00 GB, 3.20 s" in read.text
    header = read.text.index("Bytes, time and success")
    assert "openvla-7b" not in read.text[header : read.text.index("How it was measured")]


def test_what_a_part_attains_by_hand() -> None:
    """The decoder's prefill of OpenVLA-7B: 276 positions through 6.48 billion weights, two operations each."""
    dense = {point.part: point for point in limits.points_of(geometry(), "dense")}
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    operations = 2 * 276 * weights
    assert dense["prefill"].gops.value == pytest.approx(operations / 2000e6, rel=0.05)  # attention comes on top
    # llama.cpp reads 16 bits a weight; what lies between the products comes on top.
    assert 150 < dense["prefill"].intensity < operations / (2 * weights)
    # A token: two operations a weight of two bytes.
    assert dense["decode"].intensity == pytest.approx(1.0, rel=0.1)
    small = {point.part: point for point in limits.points_of(geometry(), "compressed")}
    assert small["decode"].intensity == pytest.approx(2 / (4.5 / 8), rel=0.2)
    assert small["prefill"].gops.value < 0.3 * operations / 400e6  # most of its operations are gone


def test_bits_of_every_graph() -> None:
    result = geometry()
    assert limits.bits(result, "dense", "vision") == 32.0  # widened by ONNX Runtime
    assert limits.bits(result, "dense", "decode") == 16.0  # read as it is by llama.cpp
    assert limits.bits(result, "compressed", "vision") == 4.5
    assert limits.bits(result, "torch", "prefill") == 16.0
    assert limits.bits(geometry(runtime="onnxruntime"), "dense", "prefill") == 32.0


def test_front_by_hand() -> None:
    rows = [
        {"name": "dense", "bytes": 20, "success": 0.95},
        {"name": "small", "bytes": 2, "success": 0.90},
        {"name": "slow", "bytes": 2, "success": 0.90},
        {"name": "worse", "bytes": 3, "success": 0.85},
        {"name": "fast", "bytes": 8, "success": 0.80},
    ]
    medians = {"dense": 9.0, "small": 3.0, "slow": 4.0, "worse": 3.5, "fast": 1.0}
    assert tradeoffs.on_front(rows, medians) == ["dense", "small", "fast"]


def study() -> list[dict[str, Any]]:
    def arm(name: str, seed: int | None, success: float, trained: bool, curve: list[Any]) -> dict[str, Any]:
        return {
            "name": name,
            "seed": seed,
            "recovery": [{"stage": "sft"}] if trained else [],
            "quantization": "fp16",
            "bytes": 5_000_000,
            "success": success,
            "episodes": 100,
            "interval": [success - 0.05, success + 0.04],
            "cpu_minutes": 10.0 + (seed or 0),
            "latency_ms": {"p50": 2.0, "p99": 3.0},
            "curve": curve,
        }

    way = [{"cpu_minutes": 11.0, "sampled_success": 0.5}, {"cpu_minutes": 12.0, "sampled_success": 0.6}]
    return [
        arm("dense", None, 0.95, False, []),
        arm("pruned", None, 0.45, False, []),
        arm("sft", 0, 0.90, True, []),
        arm("sft", 1, 0.80, True, []),
        arm("few-sft+ppo", 0, 0.70, True, way),
    ]


def test_seeds_of_a_study_are_pooled_and_drawn_apart(tmp_path: Path) -> None:
    arms = {arm["name"]: arm for arm in findings.pooled(study())}
    assert (arms["sft"]["success"], arms["sft"]["episodes"]) == (0.85, 200)
    assert [len(arm.seeds) for arm in findings.arms(study()[2:4])] == [2]
    (few,) = findings.arms(study()[4:])
    assert few.paths == [[(11.0, 0.5), (12.0, 0.6)]]
    file = tmp_path / "recovery.json"
    file.write_text(json.dumps(study()))
    read = Reader(page([results.read(file)]))
    assert read.tags.count("svg") == 2  # success against bytes, and against CPU-minutes
    for text in ("experts can be asked", "one demonstration a task", "few-sft+ppo"):
        assert text in read.text


def raced() -> dict[str, Any]:
    def contestant(name: str, ms: float) -> dict[str, Any]:
        return {
            "name": name,
            "precision": "fp32",
            "version": "1.0",
            "latency_ms": {"p50": ms, "p90": ms},
            "peak_rss": 10,
        }

    return {
        "kind": results.PEERS,
        "name": "smolvla",
        "policy": "SmolVLA",
        "ours": "ours",
        "wanted": 3.0,
        "note": "Random weights.",
        "command": "python race.py",
        "rows": [contestant("ours", 700.0), contestant("lerobot", 2800.0), {"name": "other", "skipped": "no wheel"}],
        "ratios": {"lerobot": [4.0, 3.8, 4.2]},
    }


def test_peers_with_intervals_and_who_was_left_out(measured: dict[str, Any]) -> None:
    read = Reader(page([measured, raced()]))
    assert "4.00x" in read.text
    assert "3.80 to 4.20" in read.text
    assert "other: no wheel" in read.text


def test_throughput_and_energy(measured: dict[str, Any]) -> None:
    rate = {"chunks_per_s": 100.0, "interval": [95.0, 105.0], "actions_per_s": 500.0, "cpu_s_per_chunk": 0.01}
    joules = {"value": 1.5, "low": 1.4, "high": 1.6}
    measured["rows"][0] |= {
        "throughput": {"1": rate, "2": rate},
        "energy": {
            **dict.fromkeys(("joules_chunk", "joules_action", "joules_chunk_above_idle"), joules),
            "watts": 9.0,
            "idle_watts": 4.0,
        },
    }
    nothing = {"kind": "energy", "command": "x", "source": "not available: no rails", "rows": [{"name": "dense"}]}
    read = Reader(page([measured, nothing]))
    for text in ("95.00 to 105.00", "500.0", "10.00 ms", "1.400 to 1.600", "Energy: not available: no rails."):
        assert text in read.text


def test_predictions_are_those_of_the_planner() -> None:
    from rlrc.jetson.model import devices
    from rlrc.jetson.model.plan import of_geometry, plan
    from rlrc.jetson.model.work import Load

    read = Reader(page([{"rows": [{"name": "a"}]}], None, None, ("smolvla-450m",)))
    planned = plan(of_geometry("smolvla-450m", "bf16", devices.device("orin-nano-8gb"), Load(), None))
    assert f"{planned.prediction.latency_ms:.2f} ms" in read.text
    assert "Predicted, not measured" in read.text
    assert all(assumption in read.text for assumption in planned.assumptions)


def test_markdown_has_the_same_and_charts_beside_it(measured: dict[str, Any], tmp_path: Path) -> None:
    measured["rows"][1]["name"] = "a|b*c"
    document = report.document([measured, geometry(), raced()], report.read_curves([str(curves(tmp_path))]), film())
    files = markdown.save(document, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| a\\|b\\*c (fp32) |" in text
    assert "**FAIL**" in text
    assert "    rlrc bench latency dense=a compressed=b" in text
    linked = re.findall(r"!\[.*\]\((page/[\w+-]+\.svg)\)", text)
    assert sorted(linked) == sorted(str(file.relative_to(tmp_path)) for file in files[1:])
    assert len(linked) == len(document.charts()) == 8
    for line in text.splitlines():
        if line.startswith("|"):
            cells = line.replace("\\|", "").count("|")
            assert cells > 2
    svg = files[1].read_text()
    assert svg.startswith("<svg width=")
    assert "var(" not in svg
    assert "http://www.w3.org/2000/svg" in svg


def test_command_writes_markdown(measured: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "measured.json", tmp_path / "report.md"
    file.write_text(results.dump(measured))
    assert main(["report", str(file), "--out", str(out), "--predict", "smolvla"]) == 0
    assert "## Other devices, predicted" in out.read_text()
    assert (tmp_path / "report" / "predictions.svg").exists()
    assert main(["report", str(file), "--out", str(out), "--force", "--predict", "smolvla-9b"]) == 2
    assert "expected one of the geometries" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("absent.json", None, "cannot be read"),
        ("broken.json", "{", "expected JSON"),
        ("list.json", "[]", '"rows"'),
        ("empty.json", '{"rows": []}', '"rows"'),
        ("curve.jsonl", "", "expected result files"),
        ("page.pdf", "", "ends in .html or .md"),
    ],
)
def test_bad_results_are_one_line_and_exit_2(
    name: str, text: str | None, reason: str, tmp_path: Path, capsys: Any
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    out = tmp_path / (name if name.startswith("page") else "report.html")
    out.unlink(missing_ok=True)
    assert main(["report", str(tmp_path / name), "--out", str(out)]) == 2
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
