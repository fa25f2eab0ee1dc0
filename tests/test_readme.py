"""The README's examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import TINY

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def block(language: str, contains: str) -> str:
    (text,) = [text for kind, text in BLOCKS if kind == language and contains in text]
    return text


def test_plugging_in_an_encoder(dic_repa, tmp_path):
    (tmp_path / "my_encoder.py").write_text(block("python", "my-patches"))
    (tmp_path / "my_recipe.yaml").write_text(block("yaml", "plugins: [my_encoder]"))
    (command,) = [text for _, text in BLOCKS if "my_recipe.yaml" in text and "dic-repa train" in text]
    verb, recipe = command.split()[1:]
    dic_repa(verb, recipe, *TINY, "--set=model.depths=[1,1,2,1,1]", "--set=train.steps=2", "--set=evaluate=null")
    line = (tmp_path / "runs/my_recipe/metrics.jsonl").read_text()
    assert "alignment.0.token" in line
    assert "alignment.1.token" in line


def test_naming_a_class_of_ones_own(dic_repa, tmp_path):
    for name, text in {"my_encoder": "my-patches", "my_head": "class PooledHead"}.items():
        (tmp_path / f"{name}.py").write_text(block("python", text))
    (tmp_path / "mine.yaml").write_text(block("yaml", "my_head:PooledHead"))
    dic_repa("train", "mine.yaml", *TINY, "--set=train.steps=2", "--set=evaluate=null")
    assert "alignment.0.token" in (tmp_path / "runs/mine/metrics.jsonl").read_text()


def test_python_examples(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny = [option.removeprefix("--set=") for option in TINY]
    training = block("python", "load_recipe(").replace('["train.steps=200"]', f"{['train.steps=200', *tiny]}")
    names = {}
    for code in (training, block("python", "Guidance("), block("python", "log_likelihood(")):
        exec(compile(code, "README.md", "exec"), names)
    assert names["x0"].shape == (2, 1, 16, 16)
    assert names["x0"].isfinite().all()
    assert names["result"].bits_per_dim.isfinite().all()
    exec(compile(block("python", "measure("), "README.md", "exec"), {})


@pytest.mark.parametrize("line", [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()])
def test_commands_exist(line, dic_repa):
    """Each option of each dic-repa command in the README is one that the verb knows."""
    command = line.split("#")[0].split(">")[0].split()
    if command[:1] != ["dic-repa"]:
        return
    below = command[1] == "bench" or command[2:3] in (["show"], ["diff"], ["check"], ["compare"])
    verb = command[1:3] if below else command[1:2]
    text = dic_repa(*verb, "--help").stdout
    for option in command:
        if option.startswith("--"):
            assert option in text, line
