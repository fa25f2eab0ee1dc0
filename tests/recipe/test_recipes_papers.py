"""The recipes for the papers' rows: each builds, and says what the papers say."""

from __future__ import annotations

import functools
import json

import pytest
import timm  # noqa: F401 - before a test is on the meta device: in torch 2.6 what it imports cannot be
import torch

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.cli import main
from dic_repa.cli.train import _paper
from dic_repa.conditions import ClassLabels
from dic_repa.errors import UserError
from dic_repa.recipe import ModelSection, Recipe, SamplingRecipe, list_paper_rows, list_recipes, load_recipe
from dic_repa.recipe.build import build_denoiser, build_objective
from dic_repa.recipe.files import paper_recipe
from dic_repa.recipe.keys import differences, flatten
from dic_repa.sampling.sampler import check_sampling

ROWS = [name for name in list_recipes() if name.startswith(("imagenet", "dic-", "sit-down", "urepa-", "ladder-"))]
OTHER_LATENTS = ["dic-xl-e2e-sdvae", "dic-xl-vavae", "dic-xl-e2e-vavae", "dic-xl-rae", "dic-xl-pixels"]
ROWS = [name for name in ROWS if name not in OTHER_LATENTS]  # test_recipes_latents.py has these
ROWS.remove("dic-xl-jit")  # in pixels
ROWS.remove("dic-b-meanflow")  # it has the values of another paper
TRAINING = [name for name in list_recipes() if isinstance(load_recipe(name), Recipe)]
UREPA = [name for name in ROWS if "urepa" in name]
TIME_AWARE, TIME_WEIGHTED = ["urepa-time-aware", "dic-xl-urepa-haste"], ["urepa-time-weight", "dic-xl-urepa-haste"]

# What the papers train all their rows with.
COMMON = {
    "data.autoencoder": "stabilityai/sd-vae-ft-ema",
    "train.batch_size": 256,
    "optimizer.learning_rate": 1e-4,
    "schedule.warmup_steps": 0,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.0,
    "train.ema_decay": 0.9999,
    "train.label_dropout": 0.1,
    "train.seed": 0,
    "model.time_scale": 1.0,
}
# What each row has of its own: steps, published results.
STEPS = {
    **dict.fromkeys(ROWS, 400_000),
    **{name: 200_000 for name in ROWS if name.startswith("ladder-")},
    "dic-h-ddpm-600k": 600_000,
    "dic-h-ddpm-800k": 800_000,
    "dic-h-ddpm-2m": 2_000_000,
    "dic-xl-ddpm-512": 3_000_000,
    "dic-h-ddpm-512": 3_000_000,
    "dic-xl-urepa": 1_000_000,
    "dic-h-urepa": 1_000_000,
    "dic-xl-urepa-haste": 1_000_000,
    "dic-xl-best": 1_000_000,
    "sit-down-xl-2-urepa": 1_000_000,
    "sit-down-xl-2-urepa-2m": 2_000_000,
    **{name: 100_000 for name in ROWS if name.startswith("urepa-")},
}
RESULTS = {
    "dic-s-ddpm": {"FID": 58.68, "IS": 25.82},
    "dic-xl-ddpm": {"FID": 13.11, "IS": 100.15},
    "dic-h-ddpm": {"FID": 11.36, "IS": 106.52},
    "dic-h-ddpm-600k": {"FID": 9.73, "IS": 118.57},
    "dic-h-ddpm-800k": {"FID": 8.96, "IS": 124.33},
    "dic-h-ddpm-2m": {"FID": 2.25},
    "dic-xl-ddpm-512": {"FID": 3.04, "IS": 271.77},
    "dic-h-ddpm-512": {"FID": 2.96, "IS": 293.54},
    "dic-xl-urepa": {"FID_ODE": 1.74, "FID_SDE": 1.75},
    "sit-down-xl-2": {"FID": 9.2},
    "sit-down-xl-2-urepa": {"FID": 1.48},
    "sit-down-xl-2-urepa-2m": {"FID": 1.41},
    "sit-down-xl-2-urepa-400k": {"FID": 5.4},
    "sit-down-l-2-urepa": {"FID": 5.8},
    "sit-down-b-2-urepa": {"FID": 15.3},
    "urepa-w0": {"FID": 6.25, "IS": 156.2},
    "urepa-w2": {"FID": 5.81, "IS": 160.8},
    "urepa-w3": {"FID": 5.72, "IS": 161.6},
    "urepa-w4": {"FID": 5.79, "IS": 160.6},
    "urepa-tap-4": {"FID": 9.42, "IS": 117.6},
    "urepa-tap-32": {"FID": 13.10, "IS": 99.4},
    "urepa-upsample-first": {"FID": 5.84, "IS": 158.5},
    "urepa-upsample-between": {"FID": 6.36, "IS": 153.4},
    "urepa-time-aware": {"FID": 5.63, "IS": 163.3},
    "urepa-time-weight": {"FID": 5.58, "IS": 164.0},
    "ladder-1-isotropic": {"FID": 29.31, "GMACs": 115.6},
    "ladder-2-isotropic-skips": {"FID": 15.07, "GMACs": 117.1},
    "ladder-3-unet-dense-skips": {"FID": 14.65, "GMACs": 115.2},
    "ladder-4-sparse-skips": {"FID": 11.49},
    "ladder-5-level-embeddings": {"FID": 10.07},
    "ladder-6-mid-modulation": {"FID": 8.80},
    "ladder-7-gates": {"FID": 6.54},
    "ladder-8-gelu": {"FID": 6.26, "GMACs": 116.1},
}


@functools.cache
def _denoiser(model: str, channels: int = 4):
    with torch.device("meta"):
        return build_denoiser(ModelSection.model_validate_json(model), channels, ClassLabels(1000))


def denoiser(recipe: Recipe):
    return _denoiser(recipe.model.model_dump_json())


@pytest.mark.parametrize("name", ROWS)
def test_row_has_the_papers_values(name):
    recipe = load_recipe(name)
    keys = flatten(recipe.model_dump(mode="json"))
    assert {key: keys[key] for key in COMMON} == COMMON
    assert recipe.train.steps == STEPS[name]
    assert recipe.data.size == (64 if name.endswith("512") else 32)
    if name in RESULTS:
        assert RESULTS[name].items() <= recipe.paper.results.items()
    ddpm = "ddpm" in name or name.startswith("ladder-")
    # The DiC authors' code neither clips the gradient nor leaves images unmirrored, and rounds pixels; REPA's does.
    drawn = {"gradient_clip": None, "flip": True, "pixels": "round"}
    if not ddpm:
        drawn = {"gradient_clip": 1.0, "flip": False, "pixels": "truncate"}
    sample, flip = recipe.sample, recipe.data.options["flip"]
    assert {"gradient_clip": recipe.train.gradient_clip, "flip": flip, "pixels": sample.pixels} == drawn
    assert sample.classes == "random"
    assert sample.guidance is None or sample.guidance.channels == (3 if ddpm else None)
    own = {"dic-xl-contrastive": "contrastive-flow-matching"}
    assert recipe.objective.name == own.get(name, "ddpm" if ddpm else "flow-matching")
    assert recipe.model.learn_sigma == ddpm


@pytest.mark.parametrize("name", UREPA)
def test_urepa_has_the_papers_alignment(name):
    recipe = load_recipe(name)
    (alignment,) = recipe.alignments
    assert alignment.encoder.startswith("dinov2-vit-")
    assert alignment.head_options == {"hidden": 2048}
    assert alignment.weight == 0.5
    weights = {"urepa-w0": 0.0, "urepa-tap-4": 0.0, "urepa-tap-32": 0.0, "urepa-w2": 2.0, "urepa-w4": 4.0}
    assert alignment.manifold_weight == weights.get(name, 3.0)
    # Counted in the order in which the blocks run, the tap is the block that the paper says.
    blocks = denoiser(recipe).blocks()
    number = 1 + next(i for i, block in enumerate(blocks) if block is denoiser(recipe).get_submodule(alignment.tap))
    half = (len(blocks) + 1) // 2
    assert number == {"urepa-tap-4": 4, "urepa-tap-32": 32}.get(name, half)
    if name.startswith("urepa-"):
        assert (recipe.model.name, len(blocks), half) == ("SiT-down-XL/2", 36, 18)
    heads = {**dict.fromkeys(TIME_AWARE, "time-aware"), "urepa-upsample-first": "mlp-upsample-first"}
    heads["urepa-upsample-between"] = "mlp-upsample-between"
    assert alignment.head == heads.get(name, "mlp")
    assert alignment.time_weight == ("v-shape" if name in TIME_WEIGHTED else "constant")
    guidance = recipe.sample.guidance
    if ", no guidance" in recipe.paper.row:
        assert guidance is None
    else:
        assert (guidance.scale, guidance.interval) == (1.8 if name.startswith("urepa-") else 1.65, (0.0, 0.7))


def test_a_dry_run_says_whose_number_it_is():
    rows = {name: load_recipe(name).paper.model_dump() for name in ("urepa-w3", "dic-xl-pixels")}
    lines = [_paper({**paper, "recipe": name, "changed": {}})[0] for name, paper in rows.items()]
    assert lines[0] == ("paper", f"{rows['urepa-w3']['row']}: FID 5.72, IS 161.6")
    numbers = "no published number of this network, FID 3.66 of JiT-B/16, FID 1.86 of JiT-H/16"
    assert lines[1] == ("paper", f"{rows['dic-xl-pixels']['row']}: {numbers}")


@pytest.mark.slow
def test_a_row_that_names_a_network_by_its_own_sign_is_saved_in_any_locale(dic_repa, tmp_path):
    """SiT↓ stands in recipes, and a recipe beside every checkpoint."""
    (tmp_path / "mine.yaml").write_text(
        "base: digits-baseline\ndescription: of SiT↓\nevaluate: null\n"
        "train: {steps: 1, batch_size: 4, sample_every: 0}\n",
        encoding="utf-8",
    )
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}
    dic_repa("train", "mine.yaml", "--set=model.width=8", "--set=model.depths=[1,1,1,1,1]", env=ascii_only)
    dic_repa("convert", "runs/mine", "small", env=ascii_only)
    assert load_recipe(tmp_path / "small/recipe.yaml").description == "of SiT↓"


def test_another_data_set_has_other_options(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: dic-xl-ddpm\ndata: {name: dit, path: data/features}\n")
    assert load_recipe(tmp_path / "mine.yaml").data.options == {}
    assert load_recipe("dic-xl-urepa", ["data.name=repa"]).data.options == {}
    assert load_recipe("dic-xl-urepa", ["data.name=prepared"]).data.options == {"flip": False}


@functools.cache  # many rows differ in steps or losses alone
def shapes(model: str, channels: int, alignments: str, size: int):
    """Shapes of prediction and projections for two images, all of it on the meta device."""
    grid, denoiser = (size // 2, size // 2), _denoiser(model, channels)
    with torch.device("meta"):
        aligned = AlignedDenoiser(
            denoiser,
            [
                Alignment.build(
                    denoiser, tap, *((768, grid) if encoder else (None, None)), (size, size), head, **options
                )
                for tap, encoder, head, options in json.loads(alignments)
            ],
        )
        output = aligned(torch.empty(2, channels, size, size), torch.empty(2), torch.empty(2, dtype=torch.int64))
    both = [each if isinstance(each, tuple) else (each, each) for each in output.projections]  # with their targets
    assert all(projection.shape == target.shape for projection, target in both)
    return tuple(output.prediction.shape), [tuple(projection.shape) for projection, _ in both]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_every_recipe_builds_on_the_meta_device(name):
    recipe = load_recipe(name)
    check_sampling(recipe.sample, build_objective(recipe.objective))
    size, channels = recipe.data.size, 1 if recipe.data.name == "digits" else 4
    if recipe.data.autoencoder == "none":
        channels = 3
    specs = [
        (a.tap, a.encoder, a.head, a.head_options | ({"teacher": a.teacher} if a.teacher else {}))
        for a in recipe.alignments
    ]
    prediction, projections = shapes(recipe.model.model_dump_json(), channels, json.dumps(specs), size)
    twice = recipe.model.learn_sigma
    assert twice == (recipe.objective.name == "ddpm" and recipe.objective.options.get("learned_variance", True))
    assert prediction == (2, 2 * channels if twice else channels, size, size)
    if all(section.encoder for section in recipe.alignments):
        assert projections == [(2, (size // 2) ** 2, 768)] * len(recipe.alignments)


def test_sampling_recipes():
    expected = {
        "sample-sde": ("euler_maruyama", 250, None),
        "sample-sde-cfg1.65": ("euler_maruyama", 250, (1.65, (0.0, 0.7))),
        "sample-sde-cfg1.8": ("euler_maruyama", 250, (1.8, (0.0, 0.7))),
        "sample-ode": ("heun", 125, None),
        "sample-ode-cfg1.65": ("heun", 125, (1.65, (0.0, 0.7))),
        "sample-ode-cfg1.8": ("heun", 125, (1.8, (0.0, 0.7))),
        "sample-ddpm": ("ddpm", 250, None),
        "sample-ddpm-cfg1.5": ("ddpm", 250, (1.5, (0.0, 1.0))),
    }
    for name, (solver, steps, guided) in expected.items():
        recipe = load_recipe(name)
        assert isinstance(recipe, SamplingRecipe)
        sample = recipe.sample
        guidance = sample.guidance and (sample.guidance.scale, sample.guidance.interval)
        assert (sample.solver, sample.steps, guidance, sample.num) == (solver, steps, guided, 50_000)
        assert (sample.classes, sample.pixels) == ("random", "round" if solver == "ddpm" else "truncate")
        assert sample.guidance is None or sample.guidance.channels == (3 if solver == "ddpm" else None)
        check_sampling(sample, build_objective(load_recipe("dic-xl-ddpm" if solver == "ddpm" else "dic-xl").objective))


def test_each_row_of_a_paper_has_one_recipe():
    own = {name: load_recipe(name).paper for name in list_recipes()}
    rows = [paper.row for paper in own.values() if paper]
    assert len(rows) == len(set(rows)) >= len(ROWS) - 1 + 8
    assert {list_paper_rows()[paper.row]: paper for paper in own.values() if paper} == {
        n: p for n, p in own.items() if p
    }


def test_a_recipe_of_ones_own_keeps_its_row_and_what_differs_is_found(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: dic-xl-urepa\nalignments.0.manifold_weight: 2.5\ntrain: {batch_size: 128}\n")
    recipe = load_recipe(mine, ["train.steps=5"])
    assert paper_recipe(recipe) == "dic-xl-urepa"
    assert differences(load_recipe("dic-xl-urepa"), recipe) == {
        "alignments.0.manifold_weight": (3.0, 2.5),
        "train.batch_size": (256, 128),
        "train.steps": (1_000_000, 5),
    }
    mine.write_text("base: dic-xl-urepa\nalignments.1.weight: 2\n")
    with pytest.raises(UserError, match=r"mine.yaml alignments.1.weight: there is no entry '1'"):
        load_recipe(mine)


def test_diff_on_the_command_line(capsys):
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main(["recipes", "diff", *arguments])
        assert exit.value.code == 0
        return capsys.readouterr().out

    assert json.loads(run("urepa-w3", "urepa-w2", "--json")) == {"alignments.0.manifold_weight": [3.0, 2.0]}
    lines = run("dic-xl", "dic-h").splitlines()
    assert [line.split() for line in lines] == [["key", "dic-xl", "dic-h"], ["model.name", "DiC-XL", "DiC-H"]]
    assert run("dic-xl", "dic-xl") == "dic-xl and dic-xl are the same\n"
    assert run("dic-xl", "dic-xl-urepa").count("alignments.0.tap") == 1
