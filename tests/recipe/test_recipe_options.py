"""Options that a part does not take: one line each, before anything has begun."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignments.0.head_options={weight: 1}", "head_options cannot hold weight"),
        ("alignments.0.head_options={tap: mid.0, grid: [1, 1]}", "head_options cannot hold grid, tap"),
        ("alignments.0.head_options={hidden: -1}", "head 'mlp' does not take these options"),
        ("alignments.0.head_options={hidden: wide}", "head 'mlp': hidden takes a whole number, not 'wide'"),
        ("alignments.0.head_options={hiden: 8}", "unknown option of head 'mlp': 'hiden'; did you mean hidden"),
        ("objective.options={path: 3}", "3 is no interpolant"),
        ("objective.options={path: {name: 3}}", "needs its name"),
        ("objective.options={prediction: 3}", "objective 'flow-matching': prediction takes a text, not 3"),
        ("objective.options={time: {name: logit-normal, std: wide}}", "std takes a number, not 'wide'"),
        ("model.options={width: 3}", "model.options: width is a key of its own"),
        ("model.options={blok: gated}", "blok"),
        ("model.options={block: gatted}", "did you mean gated?"),
        ("model.options={skips: dence}", "did you mean dense?"),
        ("train.precision=fp16", "train.precision fp16 needs a GPU; take bf16, or no for float32"),
    ],
)
def test_options_that_do_not_fit_are_one_line(mistake, tmp_path, override, message):
    small = ["--set=model.width=8", "--set=model.depths=[1,1,1,1,1]", "--set=train.steps=1"]
    assert message in mistake("train", "digits-urepa", *small, f"--set={override}")
    assert not (tmp_path / "runs").exists()
