"""Check an installed robot side: its modules are the installed ones, it has its data files and no package of training.

    python scripts/installed_check.py

Exit code 1 with one line about the first thing that is wrong.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import rlrc.runtime.cli
from rlrc.runtime.safety import profile
from rlrc.runtime.servers import key_mapping

NOT_ON_THE_ROBOT = ("torch", "transformers", "onnx", "safetensors", "mujoco", "scipy", "pandas")


def main() -> None:
    module = Path(rlrc.runtime.cli.__file__)
    if not module.is_relative_to(sys.prefix):
        sys.exit(f"expected rlrc in {sys.prefix}, found {module}")
    if present := [name for name in NOT_ON_THE_ROBOT if importlib.util.find_spec(name)]:
        sys.exit(f"expected no package of training, found {', '.join(present)}")
    profiles = {name for name in profile.list_shipped() if profile.load(name)}
    if missing := {"franka-panda", "metaworld"} - profiles | {"droid", "openvla"} - set(key_mapping.list_mappings()):
        sys.exit(f"expected profiles of robots and key mappings, found none for {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
