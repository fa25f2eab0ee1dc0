"""What a run was made with: versions, source, machine."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from dic_repa.files.cache import cache_folder
from dic_repa.files.hub import PINS

_PACKAGES = (
    "dic-repa torch torchvision accelerate timm torchdiffeq torch-fidelity diffusers datasets einops huggingface-hub "
    "safetensors pydantic pyyaml click numpy pillow matplotlib tqdm nvidia-ml-py triton"
).split()
# What launchers and libraries read; none of them may hold a secret.
_VARIABLES = (
    "OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING PYTORCH_ALLOC_CONF "
    "PYTORCH_CUDA_ALLOC_CONF RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_JOB_ID "
    "SLURM_NTASKS SLURM_NNODES HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE TORCH_HOME XDG_CACHE_HOME VIRTUAL_ENV CONDA_PREFIX"
).split()
_PREFIXES = ("ACCELERATE_", "NCCL_", "GLOO_", "TORCH_DISTRIBUTED_", "TORCHINDUCTOR_")


def describe_environment(device: str, processes: int) -> dict:
    """What a run was made with: command, versions, commits of downloads, git state of the package's source, machine."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {package: package_version(package) for package in _PACKAGES},
        "downloads": dict(PINS),
        "git": _git_state(),
        "machine": {"platform": platform.platform(), "device": device, "cpus": os.cpu_count(), "processes": processes},
    }


def package_version(package: str) -> str | None:
    """The version of an installed package, which is not imported; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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


def describe_installation() -> dict[str, dict]:
    """What a bug report needs, in sections: 'dic-repa', 'machine', 'torch', 'packages', 'variables', 'caches'."""
    import torch
    from huggingface_hub import constants

    known = describe_environment("", 1)
    git, machine = known["git"] or {}, known["machine"]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine["cpus"]
    variables = {k: v for k, v in sorted(os.environ.items()) if k in _VARIABLES or k.startswith(_PREFIXES)}
    return {
        "dic-repa": {
            "version": known["packages"].pop("dic-repa"),
            "commit": git.get("commit"),
            "changed files": git.get("changed_files", []),
        },
        "machine": {
            "platform": machine["platform"],
            "python": known["python"],
            "CPUs": f"{machine['cpus']}, of which {available} are available",
        },
        "torch": _torch(),
        "packages": known["packages"],
        "variables": variables,
        "caches": {"dic-repa": str(cache_folder()), "hub": str(constants.HF_HUB_CACHE), "torch": torch.hub.get_dir()},
    }


def _torch() -> dict:
    import torch

    cuda = torch.cuda.is_available()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if cuda else 0)]
    return {
        "version": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if cuda else None,
        "GPUs": [f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in properties],
        "threads": f"{torch.get_num_threads()} within, {torch.get_num_interop_threads()} between operations",
    }
