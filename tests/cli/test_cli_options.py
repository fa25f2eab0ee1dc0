"""Options: headed groups with their defaults in --help, counts as people write them, guidance without a scale."""

from __future__ import annotations

import re

import click
import pytest

from dic_repa.cli import VERBS, cli
from dic_repa.cli.options import Count
from dic_repa.cli.sampling_options import _parse_grid, sample_settings
from dic_repa.errors import UserError
from dic_repa.recipe import GuidanceSection, SampleSection


def help_of(*names: str) -> str:
    command, context = cli, click.Context(cli, info_name="dic-repa", **cli.context_settings)
    for name in names:
        command = command.get_command(context, name)
        context = click.Context(command, info_name=name, parent=context, **command.context_settings)
    return command.get_help(context)


@pytest.mark.parametrize("verb", ["train", "sample", "evaluate", "tune", "prepare", "bench model"])
def test_a_long_help_is_in_groups(verb):
    text = help_of(*verb.split())
    headings = re.findall(r"^([A-Z][^:\n]*):$", text, flags=re.MULTILINE)
    assert len(headings) >= 3
    assert headings[-1 if verb != "sample" else headings.index("Options")] == "Options"


def test_help_shows_defaults_and_nothing_that_is_not_there():
    for verb in VERBS:
        assert "see below" not in help_of(verb)
    text = " ".join(help_of("evaluate").split())
    assert "Images in a network at once. [default: 64]" in text
    for verb in ("sample", "evaluate"):
        text = " ".join(help_of(verb).split())
        assert "Steps of a fixed-step solver. [recipe, else 50 for an ODE, 250 for an SDE or DDPM]" in text
        assert "--interval <FLOAT FLOAT>... When guidance acts: 0 is data, 1 is noise. [recipe, else 0.0 0.7]" in text
        assert "An option with [recipe, else ...] overrides that key of the recipe's `sample` section" in text
        assert "tf32|bf16|fp16]" in text


def test_counts():
    count = Count(2)
    for text, number in (("5e4", 50_000), ("50_000", 50_000), ("2", 2), (3.0, 3)):
        assert count.convert(text, None, None) == number
    for wrong in ("1", "1.5", "many", "true", "1e-1", "nan", "9" * 5000):
        with pytest.raises(click.BadParameter, match=f"takes whole numbers from 2, not '{wrong}'"):
            count.convert(wrong, None, None)
    with pytest.raises(UserError, match="over the limit of 10,000,000"):
        Count(1, "images").convert("1e20", None, None)


@pytest.mark.parametrize("wrong", ["nan", "1e20", "-1", "inf", "x"])
def test_seconds(wrong, mistake):
    assert "Invalid value for '--seconds'" in mistake("bench", "model", "DiC-S", "--seconds", wrong)


def test_counts_on_the_command_line(mistake):
    assert "Invalid value for '--num': takes whole numbers from 1, not '1.5'" in mistake("sample", "x", "--num", "1.5")
    assert "there is no run or checkpoint folder x" in mistake("sample", "x", "--num", "5e4", "--steps", "1e1")
    assert "takes whole numbers from 1, not '0'" in mistake("train", "digits-urepa", "--dry-run", "--processes", "0")


def test_each_key_of_a_recipes_sampling_has_an_option():
    command = cli.get_command(click.Context(cli), "sample")
    options = {parameter.name: parameter for parameter in command.params}
    keys = {*SampleSection.model_fields, *GuidanceSection.model_fields} - {"guidance", "options", "classes"}
    assert keys | {"drawn_classes"} <= set(options)
    kinds = {"steps": Count, "rtol": click.types.FloatParamType, "compile": click.Choice, "interval": click.Tuple}
    assert {name: type(options[name].type) for name in kinds} == kinds
    assert options["steps"].type.least == 1
    assert options["seed"].type.least == 0


def test_flags_override_what_a_recipe_says_either_way():
    base = SampleSection(clip=True, guidance={"scale": 2.0, "doubled": True})
    changed = sample_settings(base, clip=False, doubled=False, pixels="truncate")
    assert (changed.clip, changed.guidance.doubled, changed.pixels) == (False, False, "truncate")
    assert sample_settings(base, clip=None, doubled=None, pixels=None) == base


def test_guidance_needs_a_scale():
    plain, guided = SampleSection(), SampleSection(guidance={"scale": 2.0})
    for option, value in (("interval", (0.0, 0.5)), ("channels", 3), ("weak", "runs/small"), ("rescale", 0.5)):
        with pytest.raises(UserError, match=f"--{option} needs --scale: the recipe has no guidance"):
            sample_settings(plain, **{option: value})
        assert getattr(sample_settings(guided, **{option: value}).guidance, option) == value
        assert sample_settings(plain, scale=3.0, **{option: value}).guidance.scale == 3.0
    with pytest.raises(UserError, match="--cfgpp needs --scale"):
        sample_settings(plain, kind="cfg++")
    with pytest.raises(UserError, match="--internal-interval needs --internal"):
        sample_settings(plain, internal_interval=(0.0, 0.5))
    with pytest.raises(UserError, match="--interval needs --scale"):
        sample_settings(plain, internal=1.4, interval=(0.0, 0.5))  # it would do nothing


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("karras", {"name": "karras", "options": {}}),
        ("shifted:shift=3", {"name": "shifted", "options": {"shift": 3.0}}),
        ("my.grids:Mine", {"name": "my.grids:Mine", "options": {}}),
        ("my.grids:Mine:rho=5,low=0.1", {"name": "my.grids:Mine", "options": {"rho": 5.0, "low": 0.1}}),
        ("1,0.5,0", {"times": [1.0, 0.5, 0.0]}),
        ("shifted:3", None),
        ("shifted:shift=wide", None),
    ],
)
def test_a_time_grid_on_the_line(text, grid):
    if grid is None:
        with pytest.raises(UserError, match="--grid takes a name"):
            _parse_grid(text)
    else:
        assert _parse_grid(text) == grid
