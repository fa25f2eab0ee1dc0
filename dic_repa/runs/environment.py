"""With what, where and from which source a run was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

_PACKAGES = (
    "dic-repa",
    "torch",
    "torchvision",
    "accelerate",
    "timm",
    "torchdiffeq",
    "torch-fidelity",
    "diffusers",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "pydantic",
    "pyyaml",
    "click",
    "numpy",
    "pillow",
    "matplotlib",
    "tqdm",
)


def describe_environment(device: str, processes: int) -> dict:
    """What a run was made with: command, versions, git state of the package's source, machine."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "git": _git_state(),
        "machine": {"platform": platform.platform(), "device": device, "cpus": os.cpu_count(), "processes": processes},
    }


def _git_state(file: str = __file__) -> dict | None:
    here = Path(file).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed below somebody else's repository, it is not in it
        return {"commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or git is not there
