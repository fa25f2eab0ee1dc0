"""What a shell offers behind <Tab>, through click's protocol for bash, without importing torch; and `env`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dic_repa.cli import VERBS, completion, main
from dic_repa.data.autoencoders import list_autoencoders
from dic_repa.encoders import list_encoders
from dic_repa.recipe import list_recipes
from dic_repa.samplers import list_solvers


@pytest.fixture
def offered(tmp_path, monkeypatch, capsys):
    """What is offered for a line whose last word is being typed."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").write_text("")

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_DIC_REPA_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            main([])
        return [entry.partition(",")[2] for entry in capsys.readouterr().out.splitlines()]

    return complete


def test_names_are_offered(offered):
    assert set(offered("dic-repa ")) >= set(VERBS)
    assert offered("dic-repa tr") == ["train"]
    assert offered("dic-repa recipes e") == ["explain"]
    for line in ("train", "recipes show", "recipes diff digits-urepa", "sample runs/mine --recipe", "bench train"):
        assert offered(f"dic-repa {line} digits-u") == ["digits-urepa"]
    assert offered("dic-repa train ") == list(list_recipes())
    for line in ("sample", "evaluate runs/other", "report", "probe", "tune", "ema", "solvers compare"):
        assert offered(f"dic-repa {line} runs/m") == ["runs/mine"]
    assert offered("dic-repa sample mi") == ["runs/mine"]
    assert offered("dic-repa sample runs/mine --weak ") == ["runs/mine", "runs/other"]
    assert offered("dic-repa sample runs/mine --solver dpmpp") == ["dpmpp-2m", "dpmpp-3m"]
    assert offered("dic-repa solvers compare runs/mine --solvers heun,rk") == ["heun,rk4"]
    assert offered("dic-repa tune runs/mine --solver ") == [info.name for info in list_solvers()]
    assert offered("dic-repa encoders check dinov2-vit-s") == ["dinov2-vit-s"]
    assert "none" in offered("dic-repa autoencoders check no")
    assert offered("dic-repa probe runs/mine --encoder digits") == ["digits-vit"]
    assert offered("dic-repa recipes explain optimizer.le") == ["optimizer.learning_rate"]
    assert offered("dic-repa train ./m") == ["./m"]  # the shell's own files


def test_the_lists_of_parts_are_whole():
    assert list(completion.ENCODERS) == list_encoders()
    assert list(completion.AUTOENCODERS) == list_autoencoders()


@pytest.mark.parametrize("line", ["dic-repa autoencoders check n", "dic-repa sample r", "dic-repa train d"])
def test_completion_imports_no_torch(line):
    script = "import sys, dic_repa.cli as c\ntry: c.main([])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_DIC_REPA_COMPLETE": "bash_complete"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout or "sample" in line


@pytest.mark.slow
def test_env_prints_what_a_bug_report_needs(dic_repa):
    found = json.loads(dic_repa("env", "--json", env={"WORLD_SIZE": "1", "HF_TOKEN": "hf_secret"}).stdout)
    assert found["dic-repa"]["version"]
    assert found["torch"]["version"] == torch.__version__
    assert {"accelerate", "timm", "diffusers", "numpy"} <= set(found["packages"])
    assert found["variables"]["WORLD_SIZE"] == "1"
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["torch"]["threads"].startswith("1 within")
    assert set(found["caches"]) == {"dic-repa", "hub", "torch"}
    text = dic_repa("env", env={"HF_TOKEN": "hf_secret"}).stdout
    assert "hf_secret" not in text
    assert [line for line in text.splitlines() if line[0] != " "] == [f"{section}:" for section in found]
