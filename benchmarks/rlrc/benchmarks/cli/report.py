"""The command that writes a report of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks.results.results import check_out, dump, join, open_artifacts, read, write
from rlrc.errors import UserError
from rlrc.tables import print_table


@dataclass(frozen=True)
class WriteReport:
    """Write results, training curves and a film strip as one self-contained HTML page, or as Markdown."""

    results: Positional[tuple[str, ...]]
    """result files (.json) and training curves (.jsonl, or NAME=FILE.jsonl)"""
    out: Path = Path("report.html")
    """page to write, .html or .md; charts of a Markdown page go into a folder of the same name"""
    predict: tuple[str, ...] = ()
    """geometries to predict for the devices of rlrc jetson devices, such as openvla-7b"""
    before: str | None = None
    """artifact of the upper film strip, such as pruned=FOLDER"""
    after: str | None = None
    """artifact of the lower film strip, such as compressed=FOLDER"""
    task: str = "drawer-open-v3"
    """task of the film strips"""
    scenes: int = 20
    """number of scenes to search for one in which only `after` succeeds"""
    joined: Path | None = None
    """also write all rows, joined by name, to one result file"""
    picture: Path | None = None
    """also write the table as an image (.svg or .png)"""
    beside: Path | None = None
    """earlier joined result file, whose figures are printed in parentheses"""
    force: bool = False
    """replace the page"""

    def run(self) -> None:
        from rlrc.artifact import geometries
        from rlrc.benchmarks.report import html, markdown, report

        check_out(self.out, self.force)
        if self.out.suffix not in (".html", ".md"):
            raise UserError(f"expected a page that ends in .html or .md, found {self.out}; rename it")
        for name in self.predict:
            geometries.geometry(name)
        check_out(self.joined, self.force)
        check_out(self.picture, self.force)
        if self.picture and self.picture.suffix not in (".svg", ".png"):
            raise UserError(f"expected an image that ends in .svg or .png, found {self.picture}; rename it")
        if (self.before is None) != (self.after is None):
            raise UserError("expected --before and --after, found only one; a film strip compares two artifacts")
        curve_files = [argument for argument in self.results if argument.endswith(".jsonl")]
        files = [Path(argument) for argument in self.results if not argument.endswith(".jsonl")]
        if not files:
            raise UserError("expected result files, found none; pass files written by rlrc bench ... --out")
        results = [read(path) for path in files]
        earlier = read(self.beside) if self.beside else None
        joined = join(results) if self.joined or self.beside else {}
        curves = report.read_curves(curve_files)
        film = self._film() if self.before and self.after else None
        document = report.document(results, curves, film, self.predict)
        if self.out.suffix == ".md":
            files = markdown.save(document, self.out)
        else:
            write(self.out, html.page(document))
            files = [self.out]
        if self.joined:
            write(self.joined, dump(joined))
        if self.picture:
            report.table_picture(results, self.picture)
        if earlier is not None:
            print_table(_side_by_side(joined["rows"], earlier["rows"]), Console())
        size = sum(file.stat().st_size for file in files)
        print(f"{self.out}: {size / 1e6:.2f} MB in {len(files)} file{'s' * (len(files) > 1)}; open it to read")

    def _film(self) -> Any:
        from rlrc.benchmarks.report import report
        from rlrc.benchmarks.report.film import before_and_after
        from rlrc.envs.metaworld import HORIZON, make
        from rlrc.envs.seeds import EVALUATION
        from rlrc.runtime.inference.policy import LocalPolicy

        if not 1 <= self.scenes <= len(EVALUATION):
            raise UserError(f"expected 1 to {len(EVALUATION)} scenes, found {self.scenes}; change --scenes")
        before, after = opened = open_artifacts([named for named in (self.before, self.after) if named])
        size = before.artifact.manifest.policy.cameras[0].height
        policies = {named.name: LocalPolicy.load(named.artifact.path) for named in opened}
        strips, caption = before_and_after(
            (before.name, policies[before.name]),
            (after.name, policies[after.name]),
            make(self.task, size),
            EVALUATION[: self.scenes],
            HORIZON,
        )
        return report.Film(strips, self.task, caption)


def _side_by_side(here: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> Table:
    """A table of two joined results, each figure as "here (earlier)"."""

    def figures(row: dict[str, Any] | None) -> list[str]:
        if row is None:
            return ["\u2013"] * 5
        success = f"{row['success']:.3f}" if row.get("success") is not None else "\u2013"
        latency_ms = f"{row['latency_ms']['p50']:.2f}" if "latency_ms" in row else "\u2013"
        size, minutes = f"{row['bytes'] / 1e6:.2f}", f"{row['cpu_minutes']:.1f}"
        return [size, latency_ms, success, str(row.get("episodes", "\u2013")), minutes]

    table = Table("policy", "MB", "p50 ms", "success", "episodes", "CPU-minutes", title="here (full budget, committed)")
    committed = {row["name"]: row for row in earlier}
    for row in here:
        pairs = zip(figures(row), figures(committed.get(row["name"])), strict=True)
        table.add_row(row["name"], *(f"{now} ({before})" for now, before in pairs))
    return table
