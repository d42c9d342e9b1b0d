"""Environment variables for the libraries that rlrc imports: no telemetry, and caches in rlrc's own folder.

Libraries read these variables when they are imported or make their first session, so every package of rlrc calls
``keep_local`` in its ``__init__``. Child processes inherit them. Needs the standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime 1.32 and later: on by default, also on Linux
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and all that builds on it
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",  # the convention of many others
}
CACHES = {"MPLCONFIGDIR": "matplotlib", "MESA_SHADER_CACHE_DIR": "mesa"}


def keep_local() -> None:
    """Sets the variables that are not set yet. To use another value, set it before Python starts."""
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    for name, folder in CACHES.items():
        os.environ.setdefault(name, str(cache_folder() / folder))


def cache_folder() -> Path:
    """The folder of files that rlrc can make again: RLRC_CACHE, else ``rlrc`` in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("RLRC_CACHE"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path(os.path.expanduser("~")) / ".cache") / "rlrc"
