"""The order of the rooms (scripts/architecture.py): imports point downwards, without cycles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import architecture

TORCH = architecture.LEVEL["rlrc.compressor"]  # from here on
HEAVY = {"torch", "transformers", "onnx", "peft", "accelerate", "safetensors"}
GRAPH = architecture.imports_of_all()


def test_imports_point_to_lower_rooms() -> None:
    assert architecture.arrows_upwards(GRAPH) == []


def test_no_module_imports_itself_through_others() -> None:
    assert architecture.cycles(GRAPH) == []


def test_every_room_is_in_the_order_and_has_modules() -> None:
    found = {architecture.room(name) for name in architecture.modules()}
    assert found == set(architecture.LEVEL)
    packages = {name for name, file in architecture.modules().items() if file.name == "__init__.py"}
    nested = {name for name in packages - found if architecture.room(name) in ("rlrc",)}
    assert nested == set()  # a new folder directly below rlrc needs its place in the order


def test_the_robot_side_imports_no_torch() -> None:
    for name, file in architecture.modules().items():
        if architecture.LEVEL[architecture.room(name)] < TORCH:
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                assert not {one.split(".")[0] for one in names} & HEAVY, name


def test_an_arrow_turned_round_is_found() -> None:
    turned = {"rlrc.runtime.safety.guard": {"rlrc.runtime.control.chunks", "rlrc.runtime.safety.angles"}}
    assert architecture.arrows_upwards(turned) == ["rlrc.runtime.safety.guard -> rlrc.runtime.control.chunks"]
    chunks = {"rlrc.runtime.control.chunks", "rlrc.runtime.safety.angles"}
    looped = {**GRAPH, "rlrc.runtime.safety.angles": {"rlrc.runtime.control.chunks"}}
    (cycle,) = architecture.cycles(looped)
    assert chunks <= set(cycle)


def test_imports_in_functions_and_for_types_count(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from rlrc.artifact import Manifest\n"
        "def f():\n    from rlrc.runtime import cli\n    import rlrc.errors\n"
    )
    known = {"rlrc.artifact", "rlrc.runtime", "rlrc.runtime.cli", "rlrc.errors"}
    assert architecture.imports(file, known) == known - {"rlrc.runtime"}


def test_the_picture_is_that_of_the_code() -> None:
    drawn = (architecture.ROOT / "docs/architecture.svg").read_text()
    assert drawn == architecture.draw(GRAPH), "run python scripts/architecture.py docs/architecture.svg"


def test_every_path_in_the_page_exists() -> None:
    folders = [architecture.ROOT / name for name in (*architecture.PARTS, "tests", "scripts", "reference", "docs")]
    known = [path.as_posix() for folder in folders for path in (folder, *folder.rglob("*"))]
    text = (architecture.ROOT / "docs/architecture.md").read_text()
    for path in re.findall(r"`([\w./]+/[\w./]*)`", text):
        if "NAME" not in path:
            assert any(f"{one}/".endswith(f"/{path.rstrip('/')}/") for one in known), path
