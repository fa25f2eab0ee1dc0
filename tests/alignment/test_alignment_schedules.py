"""Weights over time and over steps, in closed form and through training runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dic_repa.alignment import Alignment, manifold_loss, schedules, time_weights, token_loss
from dic_repa.encoders.digits import DigitsViT
from dic_repa.errors import UserError
from dic_repa.recipe import load_recipe
from dic_repa.training import train

TINY = ["train.batch_size=8", "train.sample_every=0", "model.width=8", "model.depths=[1,1,1,1,1]", "train.log_every=1"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train the digits for some steps; returns the run's folder."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def start(name: str, *overrides: str, resume: bool = False):
        return train(load_recipe("digits-urepa", [*TINY, *overrides]), tmp_path / name, resume=resume)

    return start


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]


def test_v_shape_is_the_papers():
    t = torch.tensor([0.0, 0.2, 0.25, 0.3, 0.5, 0.6, 0.75, 1.0])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.5, 0.7, 1.0, 1.0])
    torch.testing.assert_close(time_weights.find("v-shape")()(t), expected)
    assert torch.equal(time_weights.find("constant")()(t), torch.ones(8))


def test_each_image_has_the_weight_of_its_own_time():
    h, y, t = torch.randn(3, 6, 8), torch.randn(3, 6, 8), torch.tensor([0.1, 0.5, 0.6])
    loss, terms = Alignment("mid.0", nn.Identity(), 0.5, 3.0, time_weight="v-shape").loss(h, y, t, scale=0.25)
    per_image = token_loss(h, y) + 3 * manifold_loss(h, y)
    expected = 0.25 * 0.5 * (per_image * torch.tensor([1.0, 0.5, 0.7])).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["token"], token_loss(h, y).mean())  # what is logged is unweighted


def test_schedules_over_steps():
    cosine, stop = schedules.find("cosine")(steps=100), schedules.find("stop")(steps=3)
    values = [cosine(step) for step in (0, 25, 50, 99, 100, 500)]
    assert values == pytest.approx([1, math.cos(math.pi / 8) ** 2, 0.5, math.sin(math.pi / 200) ** 2, 0, 0])
    assert [stop(step) for step in range(5)] == [1, 1, 1, 0, 0]
    assert schedules.find("constant")()(10**9) == 1
    for name, options in [
        ("cosine", {"steps": 0}),
        ("stop", {"steps": 1.5}),
        ("stop-at-similarity", {"similarity": 2}),
    ]:
        with pytest.raises(UserError, match=f"schedule '{name}'"):
            schedules.find(name)(**options)


def test_stop_at_similarity_takes_the_mean_of_a_whole_window():
    schedule = schedules.find("stop-at-similarity")(similarity=0.5, every=2)
    scales = []
    for step, similarity in enumerate([0.9, 0.05, 0.45, 0.5, 0.6, 0.45, 0.0, 0.0]):
        scales.append(schedule(step))
        if scales[-1]:
            schedule.observe(torch.tensor(similarity))
    assert scales == [1, 1, 1, 1, 1, 1, 0, 0]  # the windows' means: 0.475, 0.475, 0.525


def test_the_encoder_is_not_run_behind_the_stop(run, monkeypatch):
    images = []
    forward = DigitsViT.forward
    monkeypatch.setattr(DigitsViT, "forward", lambda self, x: images.append(len(x)) or forward(self, x))
    done = run("stopped", "train.steps=5", "alignments.0.schedule={name: stop, steps: 2}")
    assert images == [1, 8, 8]  # a look at one image's tokens, and two steps
    lines = metrics(done)
    assert all(("alignment.0.token" in line) == (line["step"] <= 2) for line in lines)
    assert all((line["loss"] == line["denoising"]) == (line["step"] > 2) for line in lines)


def test_a_schedule_scales_the_loss(run):
    done = run("cosine", "train.steps=4", "alignments.0.schedule={name: cosine, steps: 4}")
    for line in metrics(done):
        unscaled = 0.5 * (line["alignment.0.token"] + 3 * line["alignment.0.manifold"])
        scale = (1 + math.cos(math.pi * (line["step"] - 1) / 4)) / 2
        assert line["loss"] - line["denoising"] == pytest.approx(scale * unscaled, abs=1e-5)


def test_stop_at_similarity_goes_on_alike_after_a_resume(run):
    schedule = "alignments.0.schedule={name: stop-at-similarity, similarity: 0.0, every: 3}"
    whole = run("whole", "train.steps=8", schedule)
    run("parts", "train.steps=4", schedule)  # ends inside a window
    parts = run("parts", "train.steps=8", schedule, resume=True)
    # Something was decided: it did not stop at once, and it did stop.
    aligned = ["alignment.0.token" in line for line in metrics(whole)]
    assert aligned[0]
    assert not aligned[-1]
    files = [folder.newest_checkpoint() / "model.safetensors" for folder in (whole, parts)]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_mistakes_in_a_recipe(mistake):
    for override, message in [
        ("alignments.0.schedule=cosin", "did you mean cosine"),
        ("alignments.0.schedule={name: stop}", "steps"),
        ("alignments.0.schedule=3", "a name, or a mapping of name and arguments"),
        ("alignments.0.time_weight=v", "time weight"),
        ("alignments.0.head=liner", "did you mean linear"),
    ]:
        assert message in mistake("train", "digits-urepa", "--set", "train.steps=1", "--set", override)
