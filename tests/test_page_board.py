"""What a Jetson tells of itself, on the operator's page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jetson_trees import plant

from rlrc.runtime.board import monitor as boards
from rlrc.runtime.board.jetson import read_sysfs
from rlrc.runtime.board.monitor import Board
from rlrc.runtime.page.feed import Feed

server = pytest.importorskip("rlrc.runtime.page.server", reason="the page needs the extra serve")


def served(board: Board | None) -> Any:
    feed = Feed(())
    return server.Server(feed.ends, {}, "token", board), feed


def test_a_board_is_told_once_a_second(tmp_path: Path) -> None:
    out = tmp_path / "readings.jsonl"
    cool, hot = (read_sysfs(plant(name, tmp_path / name)) for name in ("orin-nano-jp62", "thor-jp71"))
    boards.record(iter([cool]), out)
    page, feed = served(Board(out))
    told = page.figures()
    assert told == {
        "watts": pytest.approx(4.984 * 1.856),
        "celsius": pytest.approx(54.656),
        "gpu_load": 0.842,
        "memory": [(7802892 - 6123456) * 1024, 7802892 * 1024],
        "throttled": [],
    }
    json.dumps(told)
    boards.record(iter([hot]), out)
    assert page.figures() == told  # within the second
    page._read -= server.BOARD_S
    assert page.figures()["throttled"] == ["devfreq-gpu-gpc-0", "gpu"]
    assert page.figures()["gpu_load"] is None
    feed.close()
    feed.ends.socket.close()


def test_elsewhere_there_is_none() -> None:
    for board in (None, Board(None)):
        page, feed = served(board)
        assert page.figures() == {}
        feed.close()
        feed.ends.socket.close()


def test_the_page_has_a_place_for_every_figure() -> None:
    html, script = ((server.STATIC / name).read_text() for name in ("page.html", "page.js"))
    for name in ("watts", "celsius", "celsius-name", "gpu", "memory", "memory-name", "board"):
        assert f'id="{name}"' in html
        assert f'"{name}"' in script
