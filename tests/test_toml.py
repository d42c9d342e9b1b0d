"""TOML and JSON files as editors on other systems write them: with a byte order mark; and such as are none."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlrc.benchmarks.claims import claims
from rlrc.benchmarks.report import report
from rlrc.benchmarks.results import results
from rlrc.compressor.stages import recipe
from rlrc.envs.environment import read_mapping
from rlrc.envs.libero import LiberoMapping
from rlrc.errors import UserError
from rlrc.runtime.safety import profile
from rlrc.runtime.servers import observations
from rlrc.runtime.servers.key_mapping import MAPPINGS
from rlrc.strict import read_toml

ROOT = Path(__file__).parents[1]
SHIPPED: dict[str, tuple[Path, Callable[[Path, Any], Any]]] = {
    "profile": (profile.SHIPPED / "metaworld.toml", lambda path, _: profile.load(path)),
    "recipe": (recipe.BUILT_IN / "demo.toml", lambda path, _: recipe.load(path)),
    "mapping": (MAPPINGS / "libero.toml", lambda path, spec: observations.load(path, spec)),
    "thresholds": (ROOT / "benchmarks/rlrc/benchmarks/claims/claims.toml", lambda path, _: claims.thresholds(path)),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_byte_order_mark_is_no_part_of_a_file(name: str, tmp_path: Path, tiny_manifest: Any) -> None:
    path, load = SHIPPED[name]
    for mark in (codecs.BOM_UTF8, b""):
        (tmp_path / "marked.toml").write_bytes(mark + path.read_bytes().replace(b"\n", b"\r\n"))
        assert load(tmp_path / "marked.toml", tiny_manifest.policy) == load(path, tiny_manifest.policy)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    "wrong", [codecs.BOM_UTF16_LE + "a = 1".encode("utf-16-le"), b"a = \xff", b"a = " + b"[" * 9999]
)
def test_what_is_no_toml_is_refused(name: str, wrong: bytes, tmp_path: Path, tiny_manifest: Any) -> None:
    (tmp_path / "wrong.toml").write_bytes(wrong)
    with pytest.raises(UserError, match=r"expected .*wrong\.toml, found"):
        SHIPPED[name][1](tmp_path / "wrong.toml", tiny_manifest.policy)


def test_a_simulators_mapping_may_have_a_mark(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_bytes(codecs.BOM_UTF8)
    assert read_mapping(LiberoMapping, tmp_path / "m.toml") == LiberoMapping()


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = ROOT / "benchmarks/results/fuzz.json"
    (tmp_path / "result.json").write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert results.read(tmp_path / "result.json") == results.read(path)
    curve = "".join(json.dumps({"stage": "sft", "step": step, "loss": 0.5}) + "\n" for step in (1, 2))
    for name, mark in (("a", codecs.BOM_UTF8), ("b", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(mark + curve.encode())
    found = [report.read_curves([f"x={tmp_path}/{name}.jsonl"]) for name in "ab"]
    assert found[0] == found[1]


def test_the_reader_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(codecs.BOM_UTF8 + "a = 'ä'".encode())
    assert read_toml(dict[str, str], path) == {"a": "ä"}
    for wrong in (b"a = \xff", b"a = " + b"[" * 9999, b"a", b"a = 1"):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"expected .*, found"):
            read_toml(dict[str, str], path)
