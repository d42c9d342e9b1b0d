"""Result files: write, read and join them.

Every benchmark writes ``{"kind", "command", "machine", ..., "rows": [{"name", ...}, ...]}``. Rows of the same name in
several files describe the same artifact and are joined into one row of a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrc.artifact import TOKENIZER, Artifact, Manifest, check_output, load
from rlrc.errors import UserError
from rlrc.folders import replace_file
from rlrc.runtime.inference import backends

BASELINE = "dense"
GEOMETRY, PEERS, STUDY, REAL_SIZE = "claims of a geometry", "peers", "recovery study", "real size"
GEOMETRY_POLICIES = ("dense", "compressed", "torch")  # policies in the claims of a geometry
SEPARATE_KINDS = (GEOMETRY, PEERS, STUDY, REAL_SIZE)
"""Kinds of results whose rows are not joined with others: random weights, other runtimes, studies, commands."""


@dataclass(frozen=True)
class NamedArtifact:
    """An artifact and its name in tables."""

    name: str
    artifact: Artifact

    @property
    def path(self) -> Path:
        return self.artifact.path


def open_artifacts(arguments: Sequence[str | Path]) -> list[NamedArtifact]:
    """Load artifacts from ``NAME=FOLDER`` or ``FOLDER`` (named after the folder) and verify their hashes.

    Raises UserError for no artifact, duplicate names, or an artifact without graphs.
    """
    if not arguments:
        raise UserError("expected at least one artifact, found none; pass its folder, or NAME=FOLDER")
    opened = []
    for argument in map(str, arguments):
        name, equals, folder = argument.partition("=")
        # The name of an existing folder may contain "=".
        labelled = bool(equals) and not Path(argument).exists()
        path = Path(folder if labelled else argument)
        opened.append(NamedArtifact(name if labelled else path.resolve().name, load(path)))
        if not opened[-1].artifact.manifest.graphs:
            raise UserError(
                f"expected graphs that the runtime can load, found none in {path}; run rlrc export {path} OUT"
            )
    names = [named.name for named in opened]
    if len(set(names)) != len(names):
        raise UserError(f"expected a different name for every artifact, found {', '.join(names)}; pass NAME=FOLDER")
    return opened


def graph_files(manifest: Manifest) -> list[str]:
    """Files of the graphs of the chosen backend, with external weights (``decoder.onnx.data``)."""
    return sorted({file for files in _files_by_graph(manifest).values() for file in files})


def graph_bytes(manifest: Manifest) -> dict[str, int]:
    """Graph -> bytes of its files."""
    return {name: sum(manifest.files[file].size for file in files) for name, files in _files_by_graph(manifest).items()}


def _files_by_graph(manifest: Manifest) -> dict[str, list[str]]:
    backend = backends.choose(manifest)
    return {
        graph.name: [file for file in manifest.files if file == graph.file or file.startswith(f"{graph.file}.")]
        for graph in manifest.graphs
        if graph.backend == backend
    }


def sizes(manifest: Manifest) -> dict[str, Any]:
    """Bytes of all files that the runtime loads: graphs with their weights, and the tokenizer.

    A policy that is not quantized counts at most 2 bytes a parameter (bf16): fp32 files would exaggerate every ratio
    against it.
    """
    graphs = sum(manifest.files[file].size for file in graph_files(manifest))
    tokenizer = manifest.files[TOKENIZER].size if TOKENIZER in manifest.files else 0
    as_bf16 = manifest.quantization is None and graphs > 2 * manifest.parameters
    return {
        "bytes": (2 * manifest.parameters if as_bf16 else graphs) + tokenizer,
        "file_bytes": graphs,
        "tokenizer_bytes": tokenizer,
        "counting": f"as bf16, 2 bytes a parameter, + tokenizer; the {precision(manifest)} graph files take "
        f"{graphs / 1e6:.2f} MB"
        if as_bf16
        else "graph files + tokenizer",
    }


def precision(manifest: Manifest) -> str:
    """Precision of the graphs: one word, or one for each graph where they differ."""
    backend = backends.choose(manifest)
    graphs = {graph.name: graph.precision for graph in manifest.graphs if graph.backend == backend}
    if len(set(graphs.values())) == 1:
        return next(iter(graphs.values()))
    return ", ".join(f"{name} {value}" for name, value in graphs.items())


def recovery_minutes(manifest: Manifest) -> float:
    """CPU minutes from the last pruning on, pruning included; of the whole training without pruning."""
    stages = [entry.stage for entry in manifest.history]
    start = len(stages) - 1 - stages[::-1].index("prune") if "prune" in stages else 0
    return sum(entry.cpu_minutes for entry in manifest.history[start:])


def facts(named: NamedArtifact) -> dict[str, Any]:
    """The part of a row that is known without measurement."""
    manifest = named.artifact.manifest
    return {
        "name": named.name,
        "digest": named.artifact.digest,
        "parameters": manifest.parameters,
        **sizes(manifest),
        "graph_bytes": graph_bytes(manifest),
        "precision": precision(manifest),
        "cpu_minutes": round(recovery_minutes(manifest), 2),
    }


def check_out(out: Path | None, force: bool) -> None:
    """Raises UserError for an output that exists (without ``force``) or cannot be written; called before any work."""
    if out is None or (force and out.is_file()):
        return
    if out.is_dir():
        raise UserError(f"expected a file, found the folder {out}; name a file in it with --out")
    if out.exists():
        raise UserError(
            f"expected a new file, found {out} already there; choose another --out, or pass --force to replace it"
        )
    check_output(out)


def write(out: Path, text: str) -> None:
    """Write a file atomically."""
    with replace_file(out) as partial:
        partial.write_text(text, encoding="utf-8")


def dump(result: dict[str, Any] | list[dict[str, Any]]) -> str:
    """JSON with each list of plain values on one line."""
    text = json.dumps(result, indent=2, ensure_ascii=False)
    return (
        re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text) + "\n"
    )


def read(path: Path) -> dict[str, Any]:
    """Read a result file. A list of rows, the format of studies, becomes a result of kind STUDY.

    Raises UserError unless the file is JSON with named rows or the claims of a geometry.
    """
    try:
        result: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"expected a result file, found that {path} cannot be read ({error.strerror}); check the path"
        ) from None
    except ValueError:
        raise UserError(
            f"expected JSON written by rlrc bench, found something else in {path}; measure again with --out"
        ) from None
    if isinstance(result, list):
        result = {"kind": STUDY, "command": f"see the rows of {path.name}", "rows": result}
    rows = rows_of(result) if isinstance(result, dict) else None
    named = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows)
    if not rows or not named:
        raise UserError(f'expected "rows" with names, found none in {path}; pass files written by rlrc bench ... --out')
    return dict(result)


def rows_of(result: Mapping[str, Any]) -> Any:
    """The rows; from the claims of a geometry, one row for each policy."""
    if result.get("kind") != GEOMETRY:
        return result.get("rows")
    measured = [name for name in GEOMETRY_POLICIES if isinstance(result.get(name), dict)]
    return [{"name": f"{result['geometry']} {name}", **result[name]} for name in measured]


def merge(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join rows of the same name, in order of appearance; later values replace earlier ones.

    Raises UserError if two artifacts have the same name.
    """
    merged: dict[str, dict[str, Any]] = {}
    for result in results:
        for row in result["rows"]:
            known = merged.setdefault(row["name"], {})
            if known.get("digest", row.get("digest")) != row.get("digest", known.get("digest")):
                raise UserError(
                    f"expected one artifact under the name {row['name']!r}, found two; measure again as NAME=FOLDER"
                )
            known.update(row)
    return list(merged.values())


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join results into one with all commands, the machine, and rows joined by name; SEPARATE_KINDS are skipped.

    Raises UserError for results of different machines.
    """
    results = [result for result in results if result.get("kind") not in SEPARATE_KINDS]
    machines = [result.get("machine") or {} for result in results]
    kinds = {(machine.get("cpu"), machine.get("cores")) for machine in machines}
    if len(kinds) > 1:
        found = "; ".join(f"{cpu} with {cores} cores" for cpu, cores in sorted(kinds, key=str))
        raise UserError(
            f"expected results of one machine to join, found {found}; join those of each machine separately"
        )
    commands = dict.fromkeys(str(result.get("command")) for result in results)
    return {
        "kind": "results",
        "command": "; ".join(commands),
        "machine": machines[0] if machines else {},
        "rows": merge(results),
    }
