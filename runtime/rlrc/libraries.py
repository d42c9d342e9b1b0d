"""Environment variables for imported libraries: no telemetry, and caches in rlrc's own folder.

Libraries read them on import or when they create their first session, so every package of rlrc calls ``keep_local``
in its ``__init__``. Child processes inherit them. Needs the standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime 1.32 and later: on by default, also on Linux
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and libraries that use it
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",  # a convention of many other tools
}
CACHES = {"MPLCONFIGDIR": "matplotlib", "MESA_SHADER_CACHE_DIR": "mesa"}


def keep_local() -> None:
    """Sets the variables that are not set yet. Set a variable before Python starts to override it."""
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    for name, folder in CACHES.items():
        os.environ.setdefault(name, str(cache_folder() / folder))


def cache_folder() -> Path:
    """The folder of files that rlrc can recreate: RLRC_CACHE, else ``rlrc`` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("RLRC_CACHE"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path(os.path.expanduser("~")) / ".cache") / "rlrc"
