"""The configurations for `accelerate launch`, read by Accelerate itself."""

from __future__ import annotations

import subprocess
from importlib import resources

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from dic_repa.recipe import list_recipes

FOLDER = resources.files("dic_repa.recipes") / "accelerate"


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one-process", "NO", 1, 1),
        ("ddp", "MULTI_GPU", 1, 8),
        ("fsdp2", "FSDP", 1, 8),
        ("nodes", "MULTI_GPU", 2, 16),
    ],
)
def test_configuration_is_what_its_name_says(name, kind, machines, processes):
    file = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(file)
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.mixed_precision is None  # the recipe's alone
    line = ["--config_file", file, "--num_processes", str(4 * machines), "-m", "dic_repa", "train", "dic-xl-urepa"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert arguments.num_processes == 4 * machines
    assert arguments.training_script_args == ["train", "dic-xl-urepa"]
    assert arguments.use_fsdp == (kind == "FSDP")
    if kind == "FSDP":
        assert int(arguments.fsdp_version) == 2


def test_slurm_script_is_a_shell_script():
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)


def test_configurations_are_no_recipes():
    assert not {"ddp", "fsdp2", "nodes", "one-process"} & set(list_recipes())
