"""What the page of `dic-repa demo` shows, without the page: samples, estimates, the way from noise, command lines."""

from __future__ import annotations

import json
import re
import shlex
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import small_run
from small_samplers import RECIPE, write_tiny_checkpoint

from dic_repa.cli import main
from dic_repa.cli.sample import parse_classes
from dic_repa.conditions import ClassLabels, NoCondition, VectorCondition
from dic_repa.demo.models import Models
from dic_repa.demo.pictures import draw_page
from dic_repa.demo.play import MOST_IMAGES, NO_CLASS, Wish, class_words, play
from dic_repa.errors import UserError
from dic_repa.files.pictures import load_png, to_pil
from dic_repa.models import DiC
from dic_repa.models.pretrained import Pretrained
from dic_repa.objectives import DDPM, FlowMatching
from dic_repa.recipe import GuidanceSection, SampleSection, load_recipe, to_yaml
from dic_repa.recipe.build import build_denoiser
from dic_repa.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def models(checkpoint):
    return Models([checkpoint])


def last(models: Models, **wish):
    (shown,) = list(play(models, Wish(models.first, **wish)))[-1]
    return shown


CHOICES = [
    {"classes": ["3", "7"], "num": 20, "solver": "heun", "steps": 3, "scale": 2.0, "interval": (0.0, 0.7)},
    {"num": 5, "solver": "euler_maruyama", "steps": 2, "seed": 7},
    {"classes": [NO_CLASS], "num": 3, "solver": "bosh3", "tolerance": 1e-2},
]


@pytest.mark.parametrize("wish", CHOICES)
def test_the_command_line_gives_the_same_images(models, tmp_path, monkeypatch, wish):
    """In batches of 16, so that the noise of a second one is looked at too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shown = last(models, **wish)
    assert shown.state == "done"
    assert shown.done == 1
    words = shlex.split(shown.command)
    assert words[0] == "dic-repa"
    with pytest.raises(SystemExit) as exit:
        main([*words[1:], "--out", str(tmp_path / "samples")])
    assert exit.value.code == 0
    record = json.loads((tmp_path / "samples/samples.json").read_text())
    assert shown.captions == ["" if label == 10 else str(label) for label in record["labels"]]
    assert shown.evaluations == record["evaluations_per_image"]
    assert len(shown.images) == len(record["labels"]) == wish["num"]
    for i, image in enumerate(shown.images):
        assert (load_png(tmp_path / f"samples/{i:06d}.png") * 255 - image * 255).abs().max() < 0.51


def test_batches_come_one_after_another(models):
    handed_out = [(shown, len(shown.images)) for (shown,) in play(models, Wish(models.first, num=40, steps=1))]
    counts = [count for _, count in handed_out]
    assert counts == sorted(counts)
    assert {0, 40} < set(counts) <= {0, 16, 32, 40}
    assert [len(shown.images) for shown, _ in handed_out] == counts  # the sampling goes on behind the page's back


def small_denoiser(learn_sigma: bool = False) -> Pretrained:
    torch.manual_seed(0)
    denoiser = DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=4, learn_sigma=learn_sigma).requires_grad_(False)
    torch.nn.init.normal_(denoiser.output.conv2.weight, std=0.1)
    return denoiser


@pytest.mark.parametrize(
    ("objective", "solver", "learn_sigma"),
    [(FlowMatching(), "euler", False), (FlowMatching(path="vp"), "euler", False), (DDPM(), "ddim", True)],
)
def test_the_last_estimate_of_a_first_order_solver_is_its_sample(objective, solver, learn_sigma):
    """Such a solver's last step, to t = 0, goes to the data prediction itself."""
    settings = SampleSection(solver=solver, steps=4, batch_size=3, guidance={"scale": 2.0, "interval": [0.0, 1.0]})
    told = []
    sampler = Sampler(small_denoiser(learn_sigma), objective, settings, (1, 8, 8))
    sampler.watch = lambda start, t, data: told.append((start, t, sampler.to_images(data())))
    images = list(sampler(torch.tensor([0, 1, 2, 3])))
    assert [start for start, _, _ in told] == [0] * 4 + [3] * 4
    times = [t for _, t, _ in told[:4]]
    assert times == sorted(times, reverse=True)
    torch.testing.assert_close(told[3][2], images[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(told[7][2], images[1], rtol=0, atol=1e-5)
    sampler.watch = None
    for before, now in zip(images, sampler(torch.tensor([0, 1, 2, 3]))):
        torch.testing.assert_close(now, before, rtol=0, atol=0)


def test_the_way_leads_from_noise_to_the_image(models):
    shown = last(models, num=4, solver="euler", steps=20)
    trail = shown.trail
    assert trail.times == sorted(trail.times, reverse=True)
    assert (trail.times[0], trail.times[-1], len(trail.times)) == (1.0, 0.0, 9)
    assert trail.states.shape == trail.estimates.shape == (3, 9, 1, 16, 16)
    for strip in (trail.states, trail.estimates):
        torch.testing.assert_close(strip[:, -1], torch.stack(shown.images[:3]), rtol=0, atol=1e-6)
    assert shown.evaluations == 20


def test_stopping_ends_within_a_step(models):
    stop, states = threading.Event(), []
    for (shown,) in play(models, Wish(models.first, num=64, steps=250), stop):
        states.append(shown.state)
        stop.set()
    assert states[-1] == "stopped"
    assert len(shown.images) < 64
    assert models.at_work.acquire(timeout=5)
    models.at_work.release()


def test_a_closed_page_ends_the_work(models):
    playing = play(models, Wish(models.first, num=64, steps=250))
    next(playing)
    playing.close()
    assert models.at_work.acquire(timeout=5)
    models.at_work.release()


def test_the_checkpoints_of_a_run_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_run(Path("runs/mine"), "sample.steps=1", "sample.solver=euler")
    models = Models(["runs/mine", "runs/mine/checkpoints/step_00000004"])
    assert list(models.paths) == ["mine, step 8", "mine, step 4"]
    assert models.first == ["mine, step 8", "mine, step 4"]  # both were named
    assert Models(["runs/mine"]).first == ["mine, step 8"]
    newer, older = list(play(models, Wish(models.first, num=2, solver="euler", steps=1)))[-1]
    assert (newer.state, older.state) == ("done", "done")
    assert shlex.split(older.command)[2] == "runs/mine/checkpoints/step_00000004"
    assert not torch.equal(newer.images[0], older.images[0])
    assert to_pil(older.images[1]).size == (16, 16)


def test_few_checkpoints_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dic_repa.demo.models.KEPT", 1)
    models = Models([write_tiny_checkpoint(tmp_path / name) for name in ("one", "two")])
    two = models.get("two")
    assert models.get("two") is two
    assert models.get("one").source.name == "one"
    assert models.get("two") is not two


def test_only_what_all_checkpoints_take_is_offered(tmp_path, checkpoint):
    plain = write_tiny_checkpoint(tmp_path / "plain")
    recipe = RECIPE.model_copy(deep=True)
    recipe.train.label_dropout = 0.0
    (plain / "recipe.yaml").write_text(to_yaml(recipe))
    noise = write_tiny_checkpoint(tmp_path / "noise")
    recipe = load_recipe("digits-ddpm", ["model.width=8", "model.depths=[1,1,1,1,1]"])
    (noise / "recipe.yaml").write_text(to_yaml(recipe))
    models = Models([checkpoint, plain, noise])
    both = models.fit(models.first[:2])
    assert both.classes == [str(k) for k in range(10)]
    assert (both.null, both.guided) == (False, False)
    assert {"heun", "dopri5", "euler_maruyama"} < set(both.solvers)
    assert "ddpm" not in both.solvers
    assert "ddpm" in models.fit(models.first[2:]).solvers
    alone = models.fit(models.first[:1])
    assert (alone.null, alone.guided) == (True, True)
    with pytest.raises(UserError, match="trained without label dropout"):
        list(play(models, Wish(models.first[1:2], num=1, solver="euler", steps=1, scale=2.0)))


@pytest.mark.parametrize("condition", [NoCondition(), VectorCondition(2, examples=torch.eye(2), names=["up", "down"])])
def test_models_without_classes(tmp_path, condition):
    build_denoiser(RECIPE.model, 1, condition).save_pretrained(tmp_path / "model")
    (tmp_path / "model/recipe.yaml").write_text(to_yaml(RECIPE))
    models = Models([tmp_path / "model"])
    models.get("model").condition = condition  # the data's examples would be beside the weights
    fit = models.fit(models.first)
    assert (fit.classes, fit.guided, fit.null) == (list(condition.names), bool(condition.count), bool(condition.count))
    assert fit.choices == ("examples" if condition.count else "classes")
    assert last(models, num=3, solver="euler", steps=1).captions == (
        ["up", "down", "up"] if condition.count else [""] * 3
    )
    if condition.count:
        assert last(models, classes=["down"], num=1, solver="euler", steps=1, scale=2.0).captions == ["down"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"classes": ["cat"]}, "unknown class 'cat'"),
        ({"classes": [NO_CLASS, "3"]}, "choose either"),
        ({"num": MOST_IMAGES + 1}, "choose from 1 to"),
        ({"solver": "hern"}, "did you mean heun"),
        ({"solver": "ddpm"}, "needs a model trained with the objective ddpm"),
        ({"steps": 10**6}, "over the limit"),
        ({"seed": None}, "seed"),
        ({"scale": 2.0, "interval": (0.7, 0.2)}, "interval must rise"),
        ({"models": []}, "no checkpoint is chosen"),
        ({"models": ["other"]}, "unknown checkpoint 'other'"),
    ],
)
def test_what_does_not_fit_is_said_before_sampling(models, wish, message):
    with pytest.raises(UserError, match=message):
        next(play(models, Wish(**({"models": models.first} | wish))))


def test_samples_that_are_no_numbers(tmp_path):
    denoiser = write_tiny_checkpoint(tmp_path / "broken")
    loaded = DiC.from_pretrained(denoiser)
    loaded.output.conv2.bias.data.fill_(float("nan"))
    loaded.save_pretrained(denoiser)
    models = Models([denoiser])
    with pytest.raises(UserError, match="NaN"):
        last(models, num=1, solver="euler", steps=1)


def test_code_of_a_stranger_is_not_run(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "theirs")
    recipe = RECIPE.model_copy(update={"plugins": ["their_code"]})
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    with pytest.raises(UserError, match="names code to run: plugins their_code"):
        Models([folder])


def test_code_that_is_trusted(plugin_folder):
    """Also in the thread that samples, and in the command."""
    (plugin_folder / "their_code.py").write_text("")
    folder = write_tiny_checkpoint(plugin_folder / "theirs")
    recipe = RECIPE.model_copy(update={"plugins": ["their_code"]})
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    weak = {"scale": 2.0, "weak": str(folder)}  # is loaded when it is sampled from
    recipe.sample = recipe.sample.model_copy(update={"guidance": GuidanceSection(**weak)})
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    shown = last(Models([folder], trust_code=True), num=1, solver="euler", steps=1)
    assert shown.command.endswith(" --trust-code")


def test_class_names_that_look_like_something_else():
    names = ("cat", "3", "0-4", "a,b", "none", "-x", " y", "dog")
    condition = ClassLabels(len(names), names)
    for name in names:
        assert parse_classes(class_words(condition, [name]), condition) == [names.index(name)]
    assert class_words(condition, ["dog", "cat"]) == "dog,cat"
    assert parse_classes(class_words(condition, list(names)), condition) == list(range(len(names)))


def test_names_of_strangers_are_no_markup(models):
    shown = last(models, num=2, solver="euler", steps=1)
    nasty = '"><script>alert(1)</script>${alert(1)}{{1}}'
    page = draw_page([replace(shown, title=nasty, captions=[nasty] * 2)])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 1 + 2 * 3  # heading; the picture's text, the caption, and its full text
    assert not re.search(r'src="(?!data:image/png;base64,)', page)
