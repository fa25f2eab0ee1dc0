"""`dic-repa env`."""

from __future__ import annotations

import json
import os

import click

# What launchers and libraries are told by; nothing that may hold a secret.
VARIABLES = (
    "OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING PYTORCH_ALLOC_CONF "
    "PYTORCH_CUDA_ALLOC_CONF RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_JOB_ID "
    "SLURM_NTASKS SLURM_NNODES HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE TORCH_HOME XDG_CACHE_HOME VIRTUAL_ENV CONDA_PREFIX"
).split()
PREFIXES = ("ACCELERATE_", "NCCL_", "GLOO_", "TORCH_DISTRIBUTED_", "TORCHINDUCTOR_")


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool):
    """Print what a bug report needs: versions, devices, threads, what launchers have set, where caches are.

    \b
    Examples:
      dic-repa env
      dic-repa env --json > environment.json
    """
    found = describe()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    width = max(len(key) for section in found.values() for key in section)
    for title, section in found.items():
        click.echo(f"{title}:")
        for key, value in section.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            click.echo(f"  {key:{width}}  {'none' if shown is None else shown}")


def describe() -> dict[str, dict]:
    """Sections of names and values: 'dic-repa', 'machine', 'torch', 'packages', 'variables', 'caches'."""
    from dic_repa.runs.environment import describe_environment

    known = describe_environment("", 1)
    git, machine = known["git"] or {}, known["machine"]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine["cpus"]
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
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name in VARIABLES or name.startswith(PREFIXES)
        },
        "caches": _caches(),
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


def _caches() -> dict:
    import torch
    from huggingface_hub import constants

    from dic_repa.files.cache import cache_folder

    return {"dic-repa": str(cache_folder()), "hub": str(constants.HF_HUB_CACHE), "torch": torch.hub.get_dir()}
