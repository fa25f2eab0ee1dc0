"""REPA-E: the autoencoder trained with the denoiser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from pictures import save_vae, write_tree
from small_runs import ALIGNED, metrics, small_recipe, small_run
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.files.pictures import unit_images
from dic_repa.objectives import Batch
from dic_repa.sampling.convert import convert
from dic_repa.sampling.load import load
from dic_repa.training.dry_run import dry_run
from dic_repa.training.end_to_end import EPS
from dic_repa.training.inputs import step_generator
from dic_repa.training.parts import build_parts
from dic_repa.training.step import TrainingStep

KEYS = [
    "data.name=images",
    "data.path=tree",
    "data.size=16",
    "data.options={}",
    "latent.end_to_end={lpips: 0, kl: 0.01}",
    "train.label_dropout=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    write_tree(folder / "tree", {"cat": 6, "dog": 6}, size=(32, 32))
    save_vae(folder / "vae", scaling_factor=0.5, std=0.3)
    return folder


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def keys(place: Path, *more: str) -> list[str]:
    return [*KEYS, f"data.autoencoder={place / 'vae'}", *more]


def test_gradients_are_those_of_autograd(place):
    """Of one computation in which nothing is detached but what the paper detaches."""
    recipe = small_recipe(*keys(place, "train.micro_batch=2"), base=ALIGNED)
    accelerator = Accelerator(cpu=True)
    parts = build_parts(recipe, accelerator)
    step = TrainingStep(parts, recipe.train, accelerator)
    recipe.train.gradient_clip = recipe.latent.end_to_end.gradient_clip = None
    rows = [parts.data[i] for i in range(4)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    step.gradients(batch, 0)
    ours = [p.grad.clone() for p in parts.joint.trained.model.parameters()]
    denoisers = [p.grad.clone() for p in parts.denoiser.parameters()]

    autoencoder = AutoencoderKL.from_pretrained(place / "vae")
    generator = step_generator(recipe.train.seed, 0)
    draws = parts.objective.draw((4, *parts.shape), generator)
    torch.rand(4, generator=generator)
    noise = torch.randn(4, *parts.shape, generator=generator)
    images = 2 * unit_images(batch["image"]) - 1
    posterior = autoencoder.encode(images).latent_dist
    z = posterior.mean + posterior.std * noise
    with torch.no_grad():
        mean, var = z.mean(dim=(0, 2, 3), keepdim=True), z.var(dim=(0, 2, 3), correction=0, keepdim=True)
    x = (z - mean) / (var + EPS).sqrt()
    torch.testing.assert_close(x, F.batch_norm(z, None, None, training=True, eps=EPS))
    tokens = [parts.encoders[0](unit_images(batch["image"]))]

    def run(data):
        out = parts.objective(parts.model, Batch(data, batch["label"], draws))
        return out.loss.mean(), parts.aligner.compare(out.projections, tokens, out.time, [1.0])[0]

    alignment = run(x)[1]
    own = F.l1_loss(autoencoder.decode(z).sample, images) + 0.01 * posterior.kl().mean()
    expected = torch.autograd.grad(own + 1.5 / 0.5 * alignment, [*autoencoder.parameters()])
    for found, wanted in zip(ours, expected):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    expected = torch.autograd.grad(sum(run(x.detach())), [*parts.denoiser.parameters()], allow_unused=True)
    for found, wanted in zip(denoisers, expected):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, rtol=1e-4, atol=1e-6)
    # torch's own running statistics
    norm = torch.nn.BatchNorm2d(4, momentum=0.1)
    norm.running_var.fill_(4.0)  # 1 / 0.5^2
    norm(z)
    torch.testing.assert_close(parts.joint.trained.mean.data, norm.running_mean)
    torch.testing.assert_close(parts.joint.trained.variance.data, norm.running_var)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        more = ["train.steps=3", "train.checkpoint_every=3", "train.ema_decay=0.5", "sample.steps=2"]
        return small_run(tmp_path_factory.mktemp("runs") / "run", *keys(place, *more), base=ALIGNED)


def test_samples_are_decoded_by_the_trained_autoencoder(run, place, tmp_path):
    model = load(run)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    folder = run.checkpoint_path(3) / "ema" / "autoencoder"
    trained, before = AutoencoderKL.from_pretrained(folder), AutoencoderKL.from_pretrained(place / "vae")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters()))
    mean, std = (torch.tensor(trained.config[f"latents_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = (trained.decode(x * std + mean).sample / 2 + 0.5).clamp(0, 1)
    decoded = model.sampler(model.recipe.sample).decode(x)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)

    convert(run.path, tmp_path / "small")
    again = load(tmp_path / "small")
    assert torch.equal(again.sampler(again.recipe.sample).decode(x), decoded)
    assert json.loads((tmp_path / "small/data.json").read_text())["autoencoder"]["name"] == "./autoencoder"
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again.encode(images), model.encode(images))


def test_the_log_tells_of_the_autoencoder(run):
    first = metrics(run)[0]
    assert {"autoencoder.l1", "autoencoder.kl", "latent.std", "latent.spatial_std"} < set(first)


def test_a_collapse_is_told_once(place, capsys):
    recipe = small_recipe(*keys(place), base=ALIGNED)
    joint = build_parts(recipe, Accelerator(cpu=True)).joint
    for step, spread in enumerate((0.8, 0.5, 0.07, 0.05)):
        capsys.readouterr()
        joint.watch({"step": step, "latent.spatial_std": spread})
        assert ("collapse" in capsys.readouterr().err) == (step == 2)
    joint.watch({"step": 4})  # a record without it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["alignments=[]"], "no alignment"),
        (["latent.normalise=none"], "leave latent.normalise out"),
        (["latent.end_to_end={}"], "lpips needs VGG16's weights: fetch .* or set it to 0"),
        (["objective.name=contrastive-flow-matching"], "take flow-matching"),
        (["data.name=digits", "data.autoencoder=null", "data.path=null"], "pixels"),
    ],
)
def test_what_cannot_be_trained(place, changes, said):
    recipe = small_recipe(*keys(place, *changes), base=ALIGNED)
    with pytest.raises(UserError, match=said):
        build_parts(recipe, Accelerator(cpu=True))


def test_a_dry_run_says_what_cannot_be_trained(place):
    report = dry_run(small_recipe(*keys(place, "alignments=[]"), base=ALIGNED), place / "run")
    assert any("would not begin: latent.end_to_end: there is no alignment" in note for note in report["notes"])
