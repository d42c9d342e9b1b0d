"""Run a command with the kernels of a lower x86-64 class, at the full speed of this processor.

    python scripts/masked_engine.py FOLDER "x86-64 avx2" COMMAND...

FOLDER keeps a copy of ONNX Runtime whose `cpuid` instructions do not report newer instruction sets (masked_cpuid.c);
torch and oneDNN are limited by environment variables. The C library is not masked, so ``kernels()`` still names this
processor. Needs a C compiler and objdump.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime

ROOT = Path(__file__).parents[1]
AVX512 = {"HIDE_7_EBX": 0xDC230000, "HIDE_7_ECX": 0x5842}
VNNI = {"HIDE_7_ECX": 0x800}
AVX_VNNI = {"HIDE_71_EAX": 0x10}
REST = {
    "HIDE_7_EDX": 0x3C0010C,
    "HIDE_71_EAX": 0x800020,
    "HIDE_71_EDX": 0x80430,
}  # bf16, fp16, AMX, newer 8-bit products
MASKS = {  # class -> masks that hide everything above it
    "x86-64 avx512": (VNNI, AVX_VNNI, REST),
    "x86-64 avx2-vnni": (AVX512, VNNI, REST),
    "x86-64 avx2": (AVX512, VNNI, AVX_VNNI, REST),
}


def masked_engine(folder: Path) -> dict[str, str]:
    """Make a copy of the engine without `cpuid`. Returns the environment variables to use it."""
    site, library = folder / "site", folder / "masked_cpuid.so"
    if not library.exists():
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(Path(onnxruntime.__file__).parent, site / "onnxruntime")
        for path in (site / "onnxruntime/capi").glob("onnxruntime_pybind11_state*.so"):
            replace_cpuid(path)
        source = str(ROOT / "scripts/masked_cpuid.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source], check=True)
    return {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


def replace_cpuid(path: Path) -> None:
    """Replace every `cpuid` instruction by `ud2`, which has the same length."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    headers = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
    segments = re.findall(r"LOAD\s+0x(\w+) 0x(\w+) 0x\w+ 0x(\w+)", headers)
    content = bytearray(path.read_bytes())
    for address in (int(digits, 16) for digits in re.findall(r"^\s*(\w+):\s+cpuid\s*$", text, re.MULTILINE)):
        for offset, start, size in ((int(number, 16) for number in numbers) for numbers in segments):
            if start <= address < start + size:
                content[address - start + offset : address - start + offset + 2] = b"\x0f\x0b"
    path.write_bytes(content)


def mask_variables(parts: Sequence[Mapping[str, int]]) -> dict[str, str]:
    """Combine masks into the variables of masked_cpuid.c."""
    values: dict[str, int] = {}
    for part in parts:
        for name, bits in part.items():
            values[name] = values.get(name, 0) | bits
    return {name: f"{bits:x}" for name, bits in values.items()}


TORCH = {
    "x86-64 avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "x86-64 avx2-vnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "x86-64 avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def main() -> int:
    if len(sys.argv) < 4 or sys.argv[2] not in MASKS:
        print(f"expected FOLDER, one of {', '.join(MASKS)}, and a command; found {sys.argv[1:]}", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | masked_engine(folder) | mask_variables(MASKS[sys.argv[2]]) | TORCH[sys.argv[2]]
    return subprocess.call(sys.argv[3:], env=environment)


if __name__ == "__main__":
    sys.exit(main())
