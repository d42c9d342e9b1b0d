"""The rooms of the code, their order, and the imports between them.

    python scripts/architecture.py docs/architecture.svg

tests/test_architecture.py enforces the order; docs/architecture.md contains the picture.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("runtime", "compressor", "exporters", "benchmarks", "jetson")

# From the lowest to the highest. A room imports only from rooms in earlier lines.
ORDER = (
    ("rlrc",),
    ("rlrc.artifact",),
    ("rlrc.runtime", "rlrc.runtime.inference", "rlrc.runtime.board"),
    ("rlrc.runtime.safety", "rlrc.datasets", "rlrc.envs", "rlrc.runtime.wire"),
    ("rlrc.robots",),
    ("rlrc.runtime.control",),
    ("rlrc.runtime.servers",),
    ("rlrc.runtime.page",),
    ("rlrc.runtime.cli",),
    ("rlrc.compressor", "rlrc.compressor.models"),
    ("rlrc.compressor.quantize",),
    ("rlrc.compressor.checkpoints",),
    ("rlrc.compressor.training",),
    ("rlrc.compressor.prune", "rlrc.compressor.rl"),
    ("rlrc.compressor.stages",),
    ("rlrc.exporters.graphs",),
    ("rlrc.exporters.onnx", "rlrc.exporters.tensorrt"),
    ("rlrc.exporters.gguf",),
    ("rlrc.exporters",),
    ("rlrc.compressor.cli",),
    ("rlrc.jetson", "rlrc.jetson.model", "rlrc.benchmarks", "rlrc.benchmarks.results"),
    ("rlrc.benchmarks.measure",),
    ("rlrc.benchmarks.control",),
    ("rlrc.benchmarks.claims",),
    ("rlrc.benchmarks.report",),
    ("rlrc.benchmarks.cli",),
    ("rlrc.jetson.board",),
    ("rlrc.jetson.cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
Graph = Mapping[str, Iterable[str]]


def modules() -> dict[str, Path]:
    """Files of all product modules by dotted name."""
    files = {}
    for part in PARTS:
        for file in (ROOT / part / "rlrc").rglob("*.py"):
            name = ".".join(file.relative_to(ROOT / part).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = file
    return files


def room(module: str) -> str:
    """The room of a module: its longest prefix in ``ORDER``."""
    while module not in LEVEL:
        module = module.rpartition(".")[0]
    return module


def imports(file: Path, known: Iterable[str]) -> set[str]:
    """The ``known`` modules that a file imports, including inside functions and under TYPE_CHECKING."""
    known, names = set(known), set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & known) or {node.module}
            names |= {node.module} if inner - known else set()
    return names & known


def imports_of_all() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(file, known) - {name} for name, file in known.items()}


def cycles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan's algorithm)."""
    index, low, stack, groups = dict[str, int](), dict[str, int](), list[str](), list[list[str]]()

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def arrows_upwards(graph: Graph) -> list[str]:
    """Imports from a room into another one on the same or a higher level."""
    return sorted(
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if room(module) != room(other) and LEVEL[room(other)] >= LEVEL[room(module)]
    )


# The picture: one column per part with its rooms from highest to lowest; the shared rooms below

COLUMNS = {
    "compressor": ["cli", "stages", "rl", "prune", "training", "checkpoints", "quantize", "models"],
    "exporters": ["", "gguf", "onnx", "tensorrt", "graphs"],
    "runtime": ["cli", "page", "servers", "control", "wire", "safety", "board", "inference"],
    "worlds": ["robots", "envs", "datasets"],
    "benchmarks": ["cli", "report", "claims", "control", "measure", "results"],
    "jetson": ["cli", "board", "model"],
}
SHARED = ("rlrc.artifact", "rlrc")
LABELS = {
    "rlrc": "base: errors, files, processes, progress",
    "rlrc.artifact": "the artifact: what passes between the parts",
    "rlrc.exporters": "export, auto, cli",
}
WIDTH, HEIGHT, GAP, TOP = 150, 26, 14, 64


def draw(graph: Graph) -> str:
    """Draw the rooms and the arrows of ``edges`` as SVG."""
    boxes, parts = dict[str, tuple[int, int, int]](), list[str]()
    deepest = max(map(len, COLUMNS.values()))
    for column, (part, names) in enumerate(COLUMNS.items()):
        x = 20 + column * (WIDTH + 56)
        high = TOP + deepest * (HEIGHT + GAP)
        parts.append(f'<rect class="part" x="{x - 10}" y="28" width="{WIDTH + 20}" height="{high - 28}" rx="8"/>')
        title = part.replace("worlds", "robots, simulators, data")
        parts.append(f'<text class="title" x="{x}" y="48">{title}</text>')
        for row, name in enumerate(names):
            y = high - (len(names) - row) * (HEIGHT + GAP)
            boxes[".".join(filter(None, ("rlrc", part.replace("worlds", ""), name)))] = (x, y, WIDTH)
    whole = len(COLUMNS) * (WIDTH + 56) - 36
    for row, name in enumerate(SHARED):
        boxes[name] = (10, TOP + deepest * (HEIGHT + GAP) + 40 + row * (HEIGHT + GAP), whole)
    parts += [arrow(boxes[a], boxes[b], f"{a} imports {b}: {count}", a, b) for a, b, count in edges(graph, boxes)]
    for name, (x, y, width) in boxes.items():
        label = LABELS.get(name, name.removeprefix("rlrc.").rpartition(".")[2])
        parts.append(f'<rect class="room" x="{x}" y="{y}" width="{width}" height="{HEIGHT}" rx="5"/>')
        parts.append(f'<text x="{x + width / 2}" y="{y + 17}" text-anchor="middle">{escape(label)}</text>')
    size = f'width="{whole + 30}" height="{boxes["rlrc"][1] + HEIGHT + 16}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">\n' + "\n".join(
        [
            "<style>svg { background: #fff } .part { fill: #f3f5f8 } .room { fill: #fff; stroke: #56657a } "
            ".title { font-weight: bold } path { fill: none; stroke: #3b6ea5; stroke-width: 1.3 } "
            "path.far { stroke: #b06a2c } path:hover { stroke-width: 4 }</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" style="fill: context-stroke; stroke: none"/></marker></defs>',
            *parts,
            "</svg>",
            "",
        ]
    )


def edges(graph: Graph, boxes: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """Arrows between rooms (from, to, imports), without transitive arrows and arrows into the shared rooms."""
    counts = defaultdict[tuple[str, str], int](int)
    for module, others in graph.items():
        for other in others:
            counts[room(module), room(other)] += 1
    shown = {(a, b) for a, b in counts if a != b and {a, b} <= set(boxes) and b not in ("rlrc", "rlrc.artifact")}
    reach = defaultdict[str, set[str]](set)
    for a, b in sorted(shown, key=lambda pair: LEVEL[pair[0]]):
        reach[a] |= {b} | reach[b]
    for a, b in sorted(shown):
        if not any(b in reach[other] for _, other in shown if _ == a and other != b):
            yield a, b, counts[a, b]


def arrow(start: tuple[int, int, int], end: tuple[int, int, int], title: str, first: str, second: str) -> str:
    (x, y, width), (to_x, to_y, to_width) = start, end
    far = "" if first.split(".")[:2] == second.split(".")[:2] else ' class="far"'
    if x == to_x:  # downwards, at the left edge of the column
        left, bend = x, 10 + (to_y - y) // 14
        line = f"M{left},{y + HEIGHT / 2} C{left - bend},{y + HEIGHT / 2} {left - bend},{to_y + HEIGHT / 2} "
        line += f"{left},{to_y + HEIGHT / 2}"
    else:
        right = to_x > x
        a, b = (x + width, to_x) if right else (x, to_x + to_width)
        middle = (a + b) / 2
        line = f"M{a},{y + HEIGHT / 2} C{middle},{y + HEIGHT / 2} {middle},{to_y + HEIGHT / 2} {b},{to_y + HEIGHT / 2}"
    return f'<path{far} d="{line}" marker-end="url(#tip)"><title>{escape(title)}</title></path>'


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(imports_of_all()), encoding="utf-8")
