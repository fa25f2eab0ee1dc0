"""What the command line says to small mistakes, in this process: one line, before any work is done."""

from __future__ import annotations

import pytest

from dic_repa.cli import main


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_a_group_alone_prints_its_help(group, capsys):
    with pytest.raises(SystemExit) as exit:
        main(group)
    said = capsys.readouterr()
    assert exit.value.code == 0
    assert said.err == ""
    assert "\nVerbs:\n" in said.out


def test_unknown_verbs_of_groups(mistake):
    assert mistake("bench", "modl").endswith("unknown bench verb 'modl'; did you mean model?")
    assert mistake("recipes", "digits").endswith("; known: diff, show")
    assert mistake("encoders", "dinov2-vit-b").endswith("; known: check")
    assert mistake("solvers", "heun").endswith("; known: compare")


def test_a_metric_without_its_reference_is_told_before_training(mistake, tmp_path):
    said = mistake("train", "digits-baseline", "--set=evaluate.also=[fid]", "--set=train.steps=1")
    assert "fid compares with real images: give a reference (--reference, or evaluate.reference" in said
    assert not list(tmp_path.iterdir())
