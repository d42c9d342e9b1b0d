"""Coverage-guided fuzzing (atheris) of the servers' protocols for crashes, hangs and excessive memory.

    python tests/robustness/fuzz.py [--protocol openpi openvla gr00t lerobot stop page] [--messages 200000] [--seed 1]
        [--out FILE.json]

Half of the mutations change bytes (libFuzzer), half the decoded message: maps, arrays, opcodes. A message that crashes
the server, or takes more than 10 s or 512 MB, is kept in runs/fuzz and ends the run of that protocol with exit code 1.
Copy it to tests/data/fuzz/PROTOCOL, whose files tests/test_fuzz.py sends. Needs `pip install atheris`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickletools
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import atheris
import msgpack

with atheris.instrument_imports(include=["rlrc"]):  # names of packages; those of modules include their package
    from fuzz_targets import CONNECTION, HTTP, INSTRUCTED, OBSERVED, PROTOCOLS, Target, resident, seeds

    from rlrc.benchmarks.results import machine

CORPUS = Path(__file__).parents[1] / "data/fuzz"
WARM = 2000  # messages until the memory of the process is stable
REPLAYED = 20_000
EVERY = 20  # trace Python's allocations for one of so many messages
LONGEST = 4096  # bytes of a message
LIMITS = ("-timeout=10", "-rss_limit_mb=512", f"-max_len={LONGEST}", "-print_final_stats=0")

NUMBERS = (0, -1, 1, 255, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, 1e308, float("nan"), float("inf"))
OTHERS: tuple[Any, ...] = (None, True, "", "x" * 5000, "\ud800", "a\nb", b"", b"\xff" * 9, [], {}, [[[[]]]], {"a": {}})
DTYPES = ("<f4", "<f8", "|u1", "|b1", ">i2", "|O", "|V8", "<U4", "<c8", "f4", "")
SHAPES = ([], [0], [2**30], [2**62, 2**62], [-1], [1] * 40, [8, 8, 3], [3, 8, 8], [1, 8, 8, 3], [7], [1, 7], ["1"])
HEADERS = (b"'<f4'", b"'|O'", b"'<U4'", b"(1, 1, 7)", b"(1073741824,)", b"(9, 9, 9)", b"()", b"True", b"False")
FIELDS = (
    b"Content-Encoding: gzip", b"Transfer-Encoding: chunked", b"Content-Length: 0", b"Content-Length: 99999999999999",
    b"Expect: 100-continue", b"Upgrade: websocket", b"Connection: Upgrade", b"Connection: close", b" folded", b"x",
    b":", b"Host: [::1]:1", b"Origin: null", b"OPTIONS /stop HTTP/1.1", b"GET /camera/0?after=9 HTTP/1.0",
    b"x: " + b"y" * 3000,
)  # fmt: skip
ENDS = (b"\r", b"\n", b"\0", b"\xb2", b"\xff", b" ", b"\t", b":", b"9")
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--messages", type=int, default=200_000, help="for each protocol")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="result file; rows of other protocols are kept")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # worker process: fuzz, then write the row there
    args = parser.parse_args()
    if args.row is not None:
        fuzz(args.protocol[0], args.messages, args.seed, args.row)
    failed = False
    for protocol in args.protocol:
        row = run(protocol, args.messages, args.seed)
        failed |= row["crashes"] > 0
        print(json.dumps(row), flush=True)
        if args.out is not None:
            write(args.out, row)
    return int(failed)


def run(protocol: str, messages: int, seed: int) -> dict[str, Any]:
    """Fuzz in a separate process, since libFuzzer exits it. Returns the row."""
    work = Path("runs/fuzz") / protocol
    work.mkdir(parents=True, exist_ok=True)
    row = work / "row.json"
    row.unlink(missing_ok=True)
    arguments = ["--protocol", protocol, "--messages", str(messages), "--seed", str(seed)]
    subprocess.run([sys.executable, __file__, *arguments, "--row", str(row)], check=False)
    command = f"python tests/robustness/fuzz.py {' '.join(arguments)}"
    if row.exists():
        growth = {"rss_growth_bytes": measure_growth(protocol, work / "corpus")}
        return {"name": protocol, **json.loads(row.read_text()), **growth, "command": command}
    return {"name": protocol, "protocol": protocol, "crashes": 1, "command": command}


def measure_growth(protocol: str, corpus: Path) -> int:
    """Replay ``REPLAYED`` messages of the corpus. Returns the bytes by which the server's memory grows.

    Runs in a separate process, since libFuzzer's own memory keeps growing.
    """
    command = [sys.executable, str(Path(__file__).with_name("fuzz_targets.py")), protocol, str(REPLAYED), str(corpus)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write(path: Path, row: dict[str, Any]) -> None:
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [one for one in before if one["name"] != row["name"]] + [row]
    description = machine.describe(1)
    description["versions"]["atheris"] = metadata.version("atheris")
    result = {"kind": "fuzzing", "command": "python tests/robustness/fuzz.py", "machine": description, "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")


def fuzz(protocol: str, messages: int, seed: int, row: Path) -> None:
    """Fuzz and write the row. Never returns: the process exits at a finding or after the last message."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    target = loop.run_until_complete(Target.open(protocol))
    begun, count = time.monotonic(), {"messages": 0, "answered": 0, "refused": 0}
    warm_rss = peak = 0

    def one(message: bytes) -> None:
        nonlocal warm_rss, peak
        trace = count["messages"] % EVERY == 0
        if trace:
            tracemalloc.start()
        refusal = loop.run_until_complete(target.send(message))
        if trace:
            peak = max(peak, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        count["answered" if refusal is None else "refused"] += 1
        count["messages"] += 1
        if count["messages"] == min(WARM, messages):
            warm_rss = resident()
        if count["messages"] == messages:
            memory = {"peak_bytes": peak, "fuzzer_rss_growth_bytes": resident() - warm_rss}
            result = {"protocol": protocol, **count, "seconds": round(time.monotonic() - begun, 1), "crashes": 0}
            row.write_text(json.dumps({**result, **memory, "seed": seed}))
            loop.run_until_complete(target.close())
            os._exit(0)

    corpus = row.parent / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, message in enumerate(seeds(protocol)):
        (corpus / f"seed-{number}").write_bytes(message)
    folders = [str(path) for path in (corpus, CORPUS / protocol) if path.is_dir()]
    options = [*LIMITS, f"-seed={seed}", f"-artifact_prefix={row.parent}/"]
    atheris.Setup([sys.argv[0], *options, *folders], one, custom_mutator=Mutator(protocol))
    atheris.Fuzz()


class Mutator:
    """Applies libFuzzer's mutation of bytes or a mutation of the decoded message."""

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol

    def __call__(self, message: bytes, size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            return bytes(atheris.Mutate(message, size))
        try:
            mutated = self._mutate_decoded(message, chance)
        except Exception:  # the message cannot be decoded, or its mutation cannot be encoded
            mutated = b""
        return mutated[:size] or bytes(atheris.Mutate(message, size))

    def _mutate_decoded(self, message: bytes, chance: random.Random) -> bytes:
        if self._protocol in HTTP:
            return mutate_lines(message, chance)
        if self._protocol == "openvla":
            body = json.loads(message)
            if isinstance(body, dict) and isinstance(body.get("encoded"), str) and chance.random() < 0.7:
                body["encoded"] = json.dumps(change(json.loads(body["encoded"]), chance), default=str)
                return json.dumps(body).encode()
            return json.dumps(change(body, chance), default=str).encode()
        if self._protocol == "lerobot":
            return message[:1] + mutate_opcodes(message[1:], chance) if message[:1] in (OBSERVED, INSTRUCTED) else b""
        if message.startswith(CONNECTION):
            return b""
        packed: bytes = msgpack.packb(change(msgpack.unpackb(message, strict_map_key=False), chance))
        return packed


def change(value: Any, chance: random.Random) -> Any:
    """Change one place in a value of maps and lists."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        what = chance.random()
        if what < 0.7:
            return {**value, key: change(value[key], chance)}
        if what < 0.8:
            return {name: item for name, item in value.items() if name != key}
        return {**value, chance.choice([*value, *OTHERS[2:6], b"__ndarray__", "__numpy__"]): value[key]}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], change(value[place], chance), *value[place + 1 :]]
    if isinstance(value, bytes) and value.startswith(b"\x93NUMPY") and chance.random() < 0.7:
        old, new = chance.choice(HEADERS), chance.choice(HEADERS)
        matches = [part for part in (old, value[20 : 20 + chance.randrange(1, 40)]) if part in value]
        return value.replace(matches[0], new, 1)
    if isinstance(value, (bytes, str)) and value and chance.random() < 0.5:
        cut = chance.randrange(len(value))
        return chance.choice([value[:cut], value[cut:] + value[:cut], value + value[:cut]])
    return chance.choice([*NUMBERS, *OTHERS, *DTYPES, *SHAPES, [value], [value] * 3, {"a": value}])


def mutate_lines(request: bytes, chance: random.Random) -> bytes:
    """Delete, repeat, swap or change a line of a request, or insert a header field that libraries act upon."""
    head, _, body = request.partition(b"\r\n\r\n")
    parts = head.split(b"\r\n")
    edit(
        parts,
        chance,
        changed=lambda part: chance.choice([part + chance.choice(ENDS), *FIELDS]),
        new=lambda: chance.choice(FIELDS),
    )
    return b"\r\n".join(parts) + b"\r\n\r\n" + body


def mutate_opcodes(pickled: bytes, chance: random.Random) -> bytes:
    """Delete, repeat, swap, change or insert opcodes of a pickle, which may be inside a protobuf field."""
    start = pickled.index(b"\x80")
    places = [place for _, _, place in pickletools.genops(pickled[start:])]
    parts = [pickled[start + a : start + b] for a, b in zip(places, [*places[1:], None], strict=True)]
    for _ in range(chance.randrange(1, 4)):
        edit(
            parts,
            chance,
            changed=lambda part: chance.choice(OPCODES) + part[1:],
            new=lambda: chance.choice(OPCODES) + chance.randbytes(chance.randrange(9)),
        )
    return pickled[:start] + b"".join(parts)


def edit(
    parts: list[bytes], chance: random.Random, changed: Callable[[bytes], bytes], new: Callable[[], bytes]
) -> None:
    """Delete, repeat, swap or change one part, or insert a new one."""
    here, there = chance.randrange(len(parts)), chance.randrange(len(parts))
    what = chance.randrange(5)
    if what == 0:
        del parts[here]
    elif what == 1:
        parts.insert(there, parts[here])
    elif what == 2:
        parts[here], parts[there] = parts[there], parts[here]
    elif what == 3:
        parts[here] = changed(parts[here])
    else:
        parts.insert(here, new())


if __name__ == "__main__":
    raise SystemExit(main())
