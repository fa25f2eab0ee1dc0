"""What a loaded model does with given images, against a denoiser that is perfect for Gaussian data, and diffusers' own
latents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pictures import save_vae
from PIL import Image
from torch import nn

from dic_repa import load
from dic_repa.conditions import VectorCondition
from dic_repa.errors import UserError
from dic_repa.interpolants import expand_as
from dic_repa.models import DiC
from dic_repa.models.pretrained import Pretrained
from dic_repa.objectives import DDPM
from dic_repa.recipe import load_training_recipe, to_yaml
from dic_repa.recipe.build import build_objective
from dic_repa.sampling.load import Checkpoint
from dic_repa.sampling.sampler import Sampler

STD = 0.2


class Perfect(Pretrained):
    """Predicts what should be predicted for pixels that are N(mean of the class, STD^2); without a class it is 0."""

    in_channels, num_classes = 1, 10

    def __init__(self, objective, prediction: str):
        super().__init__()
        self.objective, self.prediction, self.unused = objective, prediction, nn.Parameter(torch.zeros(()))

    @staticmethod
    def mean(y):
        return torch.where(y < 10, (y - 4.5) / 10, 0.0)

    def forward(self, x, t, y):
        path, mean = self.objective.path, expand_as(self.mean(y), x)
        if isinstance(self.objective, DDPM):  # t is a step, or between two
            known = 0.5 * torch.log((1 - self.objective.schedule.alpha_bar) / self.objective.schedule.alpha_bar)
            ratio = torch.from_numpy(np.exp(np.interp(t.double(), np.arange(len(known)), known)))
            t = path.time_at_ratio(ratio).to(x)
        c = path.coefficients(expand_as(t, x))
        pull = (x - c.alpha * mean) / ((c.alpha * STD) ** 2 + c.sigma**2)
        return path.target(mean + c.alpha * STD**2 * pull, c.sigma * pull, t, self.prediction)


OBJECTIVES = {
    "linear": {"path": "linear"},
    "cosine": {"path": "cosine", "prediction": "noise"},
    "vp": {"path": "vp", "prediction": "noise"},
    "data": {"prediction": "data"},
    "score": {"prediction": "score"},
    "wide noise": {"path": {"name": "linear", "noise_scale": 2.0}, "prediction": "data"},
}


def perfect(name: str) -> Checkpoint:
    options = OBJECTIVES.get(name, {"path": "linear"})
    recipe = load_training_recipe("digits-ddpm" if name == "ddpm" else "digits-urepa")
    if name != "ddpm":
        recipe.objective.options = options
    objective = build_objective(recipe.objective)
    default = "noise" if name == "ddpm" else "velocity"
    return Checkpoint(Perfect(objective, options.get("prediction", default)), recipe, source="perfect")


@pytest.fixture
def model() -> Checkpoint:
    return perfect("linear")


CLASSES = ["3", 7]
IMAGES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
MEANS = torch.tensor([-0.15, 0.25]).reshape(2, 1, 1, 1)


@pytest.mark.parametrize("name", [*OBJECTIVES, "ddpm"])
def test_each_objective_inverts_and_judges(name):
    model = perfect(name)
    noise = model.invert(IMAGES, CLASSES, steps=60)  # by heun, where the recipe's own solver is that of ddpm
    torch.testing.assert_close(noise, (2 * IMAGES - 1 - MEANS) / STD, rtol=0, atol=0.08)
    again = model.sample(CLASSES, noise=noise, output="pt", solver="heun", steps=60)
    torch.testing.assert_close(again, IMAGES, rtol=0, atol=0.01)
    found = model.log_likelihood(IMAGES, CLASSES, solver="heun", steps=60)
    squares = ((2 * IMAGES - 1 - MEANS) / STD).square().flatten(1).mean(1)
    bits = (0.5 * squares + 0.5 * math.log(2 * math.pi * STD**2)) / math.log(2) - math.log2(2 / 255)
    torch.testing.assert_close(found.bits_per_dim, bits, rtol=0, atol=0.1)  # a vp path begins at t = 0.001


@pytest.mark.parametrize("name", ["linear", "vp", "ddpm"])
def test_an_edit_keeps_what_strength_leaves_and_turns_into_the_class(name):
    model = perfect(name)
    grey = Image.new("L", (16, 16), 128)
    little, much = (model.edit(grey, strength, "7", output="pt", steps=20) * 2 - 1 for strength in (0.02, 0.9))
    assert abs(little.mean()) < 0.05
    assert abs(much.mean() - 0.25) < 0.05
    assert abs(much.std() - STD) < 0.03
    several = model.edit(grey, 0.9, np.array([0, 9]), steps=5)
    assert [np.array(image).mean() > 128 for image in several] == [False, True]
    by_sde = model.edit(grey, 0.9, "7", output="pt", solver="euler_maruyama", steps=60) * 2 - 1
    assert abs(by_sde.mean() - 0.25) < 0.05


class OfVectors(Perfect):
    """The mean is the number that it is conditioned on."""

    num_classes = 0
    conditioned_on = VectorCondition(1, null="zeros")

    @staticmethod
    def mean(y):
        return y[:, 0]


def test_vectors_in_place_of_classes(model):
    model.denoiser = OfVectors(model.denoiser.objective, "velocity")
    grey = [Image.new("L", (16, 16), 128)] * 2
    made = model.edit(grey, 0.9, conditions=torch.tensor([[0.3], [-0.3]]), output="pt", steps=10) * 2 - 1
    torch.testing.assert_close(made.mean((1, 2, 3)), torch.tensor([0.3, -0.3]), rtol=0, atol=0.08)
    noise = model.invert(IMAGES, conditions=MEANS.reshape(2, 1), steps=60)
    torch.testing.assert_close(noise, (2 * IMAGES - 1 - MEANS) / STD, rtol=0, atol=0.08)
    without = model.invert(IMAGES, steps=60)  # the null, whose mean is 0
    torch.testing.assert_close(without, (2 * IMAGES - 1) / STD, rtol=0, atol=0.08)
    with pytest.raises(UserError, match="1 conditions for 2 images"):
        model.invert(IMAGES, conditions=torch.zeros(1, 1))


def test_what_is_not_marked_stays(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:9] = True
    (painted,) = model.inpaint(image, mask, "9", steps=8, resample=3)
    kept = ~mask.numpy()
    assert np.array_equal(np.array(painted)[kept], np.array(image)[kept])
    assert abs((np.array(painted)[~kept] / 127.5 - 1).mean() - 0.45) < 0.1  # the class's mean
    white = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    assert model.inpaint([image], white, ["9"], steps=8, resample=3)[0].tobytes() == painted.tobytes()


def test_between_two_seeds_or_images(model):
    shots = {"solver": "heun", "steps": 8}
    made = model.interpolate(4, 5, steps=5, classes="3", solver="heun", solver_steps=8)
    assert len(made) == 5
    for end, seed in ((made[0], 4), (made[-1], 5)):
        assert end.tobytes() == model.sample(["3"], seed=seed, **shots)[0].tobytes()
    between = model.interpolate(IMAGES[0], IMAGES[1], 3, CLASSES[:1] * 3, solver_steps=60, output="pt")
    torch.testing.assert_close(between[[0, 2]], IMAGES, rtol=0, atol=0.01)
    spread = (between[1] * 2 - 1 - MEANS[0]).std()  # the arc keeps it; half way on a line it is less
    assert spread > 0.85 * (IMAGES * 2 - 1 - MEANS[0]).std()


def test_pictures_files_and_tensors_are_the_same(model, tmp_path):
    levels = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    grey = [Image.fromarray(image[0].numpy()) for image in levels]
    for image, name in zip(grey, "ab"):
        image.convert("RGB").save(tmp_path / f"{name}.png")
    expected = levels.float() / 255 * 2 - 1
    files = [tmp_path / "a.png", str(tmp_path / "b.png")]
    for given in (levels, levels.float() / 255, grey, files, [levels[0], files[1]], iter(grey)):
        torch.testing.assert_close(model.encode(given), expected)
    torch.testing.assert_close(model.encode(grey[0]), expected[:1])
    assert [image.tobytes() for image in model.decode(expected)] == [image.tobytes() for image in grey]
    torch.testing.assert_close(model.decode(expected, "pt"), levels.float() / 255)


@pytest.fixture
def behind_a_vae(tmp_path, monkeypatch) -> Checkpoint:
    monkeypatch.chdir(tmp_path)
    save_vae(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.1)
    small = ["model.width=8", "model.depths=[1,1,1,1,1]", "data.size=8", "data.autoencoder=vae", "data.name=images"]
    recipe = load_training_recipe("digits-urepa", [*small, "data.path=gone", "data.options={}"])
    DiC(8, (1, 1, 1, 1, 1), in_channels=4, num_classes=2).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text(to_yaml(recipe))
    return load(tmp_path / "model")


def test_latents(behind_a_vae, monkeypatch):
    images = torch.rand(2, 3, 16, 16)
    latents = behind_a_vae.encode(images)
    with torch.no_grad():
        mean = AutoencoderKL.from_pretrained("vae").encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(latents, (mean - 0.1) * 0.5)
    assert behind_a_vae.edit(images, 0.5, "1", steps=2)[1].size == (16, 16)
    monkeypatch.setattr(Sampler, "to_images", lambda self, x: x)  # to see them
    mask = torch.zeros(16, 16)
    mask[3, 7] = 1
    painted = behind_a_vae.inpaint(images, mask, 0, steps=2, output="pt")
    changed = (painted - latents).abs().amax(1) > 1e-6
    assert [place.tolist() for place in changed.nonzero()] == [[0, 1, 3], [1, 1, 3]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode([]), "there are no images"),
        (lambda m: m.encode(torch.zeros(1, 3, 16, 16)), "image 0 has 3 channels, the model's images have 1"),
        (lambda m: m.encode([Image.new("L", (16, 16)), Image.new("RGB", (16, 16), (9, 0, 0))]), "image 1 has 3 ch"),
        (lambda m: m.encode(Image.new("L", (20, 16))), "image 0 is 20x16, the model's images are 16x16"),
        (lambda m: m.encode(torch.full((1, 1, 16, 16), math.nan)), "out of"),
        (lambda m: m.encode(3), "image 0 is a int"),
        (lambda m: m.encode("gone.png"), "no image file gone.png"),
        (lambda m: m.edit(IMAGES, classes=["cat", 1]), "unknown class 'cat'"),
        (lambda m: m.edit(IMAGES, classes=[1, 2, 3]), "3 classes for 2 images"),
        (lambda m: m.edit(IMAGES, strength=0), "strength=0"),
        (lambda m: m.edit(IMAGES, solver="ddpm"), "needs one of an ODE or an SDE"),
        (lambda m: m.edit(IMAGES, output="png"), "unknown output 'png'"),
        (lambda m: m.invert(IMAGES, solver="dpmpp-2m"), "noise to data only"),
        (lambda m: m.inpaint(IMAGES, torch.zeros(16, 16)), "white nowhere"),
        (lambda m: m.inpaint(IMAGES, torch.ones(8, 8)), "the mask is"),
        (lambda m: m.inpaint(IMAGES, torch.ones(16, 16), solver="dopri5"), "chooses its own steps"),
        (lambda m: m.interpolate(1, 2, steps=1), "at least two"),
        (lambda m: m.interpolate(IMAGES, 2), "one image, not 2"),
        (lambda m: m.sample([1], noise=torch.zeros(2, 1, 16, 16)), "rows of noise"),
    ],
)
def test_bad_input_is_one_line(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_model_without_a_null_class_asks_for_classes(model):
    model.recipe.train.label_dropout = 0.0
    with pytest.raises(UserError, match="no null class: give classes"):
        model.invert(IMAGES)
