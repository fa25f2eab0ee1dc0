"""Options of a wrong kind are told when a part is made, and at the dry run already."""

from __future__ import annotations

import numpy as np
import pytest

from dic_repa.errors import UserError
from dic_repa.recipe import load_recipe
from dic_repa.registry import Registry
from dic_repa.training.dry_run import dry_run

parts = Registry("part")


@parts.register("all")
class All:
    def __init__(
        self, flip: bool = False, rate: float = 1.0, count: int = 1, name: str | None = None, other: list = ()
    ):
        self.given = flip, rate, count, name, other


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"flip": "no"}, "flip takes true or false, not 'no'"),
        ({"flip": 1}, "flip takes true or false, not 1"),
        ({"rate": True}, "rate takes a number, not True"),
        ({"rate": "1e-3"}, "rate takes a number, not '1e-3'"),
        ({"count": True}, "count takes a whole number, not True"),
        ({"count": 1.5}, "count takes a whole number, not 1.5"),
        ({"count": [1]}, "count takes a whole number, not"),
        ({"name": 5}, "name takes a text or null, not 5"),
    ],
)
def test_wrong_kinds(option, said):
    with pytest.raises(UserError, match=f"part 'all': {said}"):
        parts.create("all", **option)


def test_right_kinds():
    for given in (
        {"rate": 1},
        {"rate": np.float32(1)},
        {"count": np.int64(3)},
        {"name": None},
        {"other": {1}},
        {"flip": True},
    ):
        assert parts.create("all", **given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data={name: images, path: nowhere, options: {flip: maybe}}", "flip takes true or false, not 'maybe'"),
        ("data={name: prepared, path: nowhere, options: {flips: true}}", "unknown option of data set 'prepared'"),
        ("alignments.0.head_options={hidden: true}", "hidden takes"),
        ("alignments.0.time_weight={name: v-shape, x: 1}", "unknown option of time weight"),
        ("optimizer.options={eps: [1]}", "adamw"),
        ("schedule={name: cosine, options: {final: yes}}", "final takes a number, not True"),
        ("objective.options={time: {name: logit-normal, mean: x}}", "mean takes a number, not 'x'"),
        ("sample.grid={name: shifted, options: {shift: yes}}", "shift takes a number or a text, not True"),
        ("train.trackers=[nowhere]", "unknown tracker 'nowhere'"),
        (
            "model={name: DiC, width: 20000, depths: [1, 1, 1, 1, 1], options: {block: 5}}",
            "block takes a text, not 5",
        ),
    ],
)
def test_the_dry_run_tells(change, said, tmp_path):
    with pytest.raises(UserError, match=said):
        dry_run(load_recipe("digits-urepa", [change]), tmp_path / "run")
