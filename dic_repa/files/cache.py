"""The folder for what can be computed again."""

import os
from pathlib import Path


def cache_folder(name: str = "", variable: str = "") -> Path:
    """The folder that the environment `variable` names, or `dic-repa/NAME` in the user's cache folder."""
    if variable and (folder := os.environ.get(variable)):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dic-repa" / name
