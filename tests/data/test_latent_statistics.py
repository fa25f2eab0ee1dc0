"""The latents' statistics: in closed form, the same however `prepare` was run, and used by all that makes pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import save_vae, write_tree
from prepare_slowly import preparation
from small_runs import SMALL

from dic_repa.data.autoencoders import AutoencoderSpec, LatentStatistics
from dic_repa.data.latents import denoiser_data
from dic_repa.data.prepared import Prepared
from dic_repa.data.statistics import write_statistics
from dic_repa.errors import UserError
from dic_repa.files.pictures import load_png
from dic_repa.recipe import Recipe, load_recipe, to_yaml
from dic_repa.recipe.build import build_autoencoder, build_dataset, data_traits
from dic_repa.runs.folder import RunFolder
from dic_repa.sampling.load import load
from dic_repa.sampling.verify import verify
from dic_repa.training import train

PER_CHANNEL = "latent.normalise=per-channel"


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with a tree of 7 images, a tiny vae whose posterior deviates, and the tree prepared by it, mirrored."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("there")
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        write_tree(Path("tree"), {"cat": 2, "dog": 5})
        save_vae(Path("vae"), std=0.3, scaling_factor=0.5, shift_factor=0.1)
        prepare(folder / "data")
    return folder


def prepare(out: Path, tree: str = "tree", autoencoder=None, **options) -> Path:
    work = preparation(tree, out, autoencoder or str(out.parent / "vae"), **{"flip": True, **options})
    work.begin()
    work.write_shards()
    work.complete()
    return out


def stored(folder: Path, names=("moments", "moments_flipped")) -> np.ndarray:
    """(N, 2C, h, w) in float64, as `datasets` reads them."""
    import datasets

    rows = datasets.load_from_disk(str(folder)).with_format("numpy")
    return np.concatenate([np.stack([np.asarray(row[name]) for row in rows]) for name in names]).astype(np.float64)


def recipe(data: Path, *overrides: str) -> Recipe:
    settings = [*SMALL, "data.name=prepared", f"data.path={data}", "data.size=16", "data.options={}", "train.steps=2"]
    settings += ["train.checkpoint_every=2", "sample.steps=2", "sample.num=4", "train.sample_every=0"]
    return load_recipe("digits-urepa", [*settings, *overrides])


def test_closed_form(there):
    """E[z] = E[mean]; Var[z] = Var[mean] + E[std^2], over images, mirrored ones and places."""
    mean, std = np.split(stored(there / "data"), 2, axis=1)
    axes = (0, 2, 3)
    found = Prepared(there / "data").statistics
    np.testing.assert_allclose(found.mean, mean.mean(axis=axes), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.std, np.sqrt(mean.var(axis=axes) + (std**2).mean(axis=axes)), rtol=1e-7)
    assert min(std.ravel()) > 0.29  # so that the second term counts
    report = json.loads((there / "data/check.json").read_text())
    assert report["latents"] == {"mean": list(found.mean), "std": list(found.std)}


def test_what_the_denoiser_is_trained_on(there):
    """Over noise of mean 0 and deviation 1: each channel has mean 0 and deviation 1. Else the autoencoder's own."""
    data = build_dataset(recipe(there / "data", PER_CHANNEL).data)
    batch = {"moments": torch.stack([data[k]["moments"] for k in range(len(data))])}
    rows = [denoiser_data(data, batch, lambda like, sign=sign: torch.full_like(like, sign)) for sign in (-1, 1)]
    x = torch.cat(rows).double()
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(x.std(dim=(0, 2, 3), correction=0), torch.ones(4).double(), rtol=2e-6, atol=0)
    mean, std = batch["moments"].float().chunk(2, dim=1)
    plain, none = (build_dataset(recipe(there / "data", *(set_to)).data) for set_to in ((), ("latent.normalise=none",)))
    assert torch.equal(denoiser_data(plain, batch, torch.ones_like), (mean + std - 0.1) * 0.5)  # bit for bit
    assert torch.equal(denoiser_data(none, batch, torch.ones_like), mean + std)


class Latents:
    """An autoencoder without a posterior: the mean of each 2x2 block, and a channel that never changes."""

    def __init__(self):
        self.spec = AutoencoderSpec("blocks", 4, 2, (0.5,) * 4, (2.0,) * 4, stochastic=False)
        self.device = torch.device("cpu")

    def encode(self, images):
        return torch.cat([torch.nn.functional.avg_pool2d(images, 2), torch.full_like(images[:, :1, ::2, ::2], 0.7)], 1)

    def decode(self, x):
        return torch.nn.functional.interpolate(self.spec.denormalise(x)[:, :3], scale_factor=2)


@pytest.mark.parametrize("moments", ["float16", "float32"])
def test_without_a_posterior(there, moments, monkeypatch):
    """The latents alone are stored, in either precision; a constant channel is shifted to 0 and keeps its scale."""
    monkeypatch.chdir(there)
    prepare(out := there / f"blocks-{moments}", autoencoder=Latents(), moments=moments, flip=False)
    z = stored(out, ["moments"])
    data = Prepared(out, size=16)
    assert data[0]["moments"].dtype == getattr(torch, moments)
    assert data[0]["moments"].shape == (4, 16, 16)
    np.testing.assert_allclose(data.statistics.mean[:3], z.mean(axis=(0, 2, 3))[:3], rtol=1e-7)
    np.testing.assert_allclose(data.statistics.std[:3], z.std(axis=(0, 2, 3))[:3], rtol=1e-7)
    assert data.statistics.std[3] == 0
    data.normalise("per-channel")
    assert data.spec.scale[3] == 1
    x = denoiser_data(data, {"moments": data[0]["moments"][None]}, torch.zeros_like)
    assert x[:, 3].abs().max() < 1e-6


def test_a_stop_changes_nothing_and_a_finished_data_set_is_only_measured(there, tmp_path, monkeypatch):
    """The file is the same in bytes; an earlier version's data set has none, and nothing is encoded to add it."""
    out = Path(shutil.copytree(there / "data", tmp_path / "data"))
    (tmp_path / "vae").symlink_to(there / "vae")
    monkeypatch.chdir(there)
    expected = (out / "latents.json").read_bytes()
    sorted(out.glob("*.arrow"))[1].unlink()  # as after a kill
    work = preparation("tree", out, str(there / "vae"), flip=True)
    work.begin()
    assert not (out / "latents.json").exists()
    prepare(out)
    assert (out / "latents.json").read_bytes() == expected
    (out / "latents.json").unlink()
    settings = json.loads((out / "prepare.json").read_text())
    del settings["autoencoder"]["stochastic"], settings["autoencoder"]["normalisation"]  # an earlier version's
    (out / "prepare.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"data lacks latents.json, .*the same `dic-repa prepare` .* without encoding"):
        build_dataset(recipe(out, PER_CHANNEL).data)
    monkeypatch.setattr(type(work.autoencoder), "encode", None)
    prepare(out)
    assert (out / "latents.json").read_bytes() == expected


def test_damaged_ones_and_those_of_other_latents_are_refused(there, tmp_path, monkeypatch):
    monkeypatch.chdir(there)
    (tmp_path / "vae").symlink_to(there / "vae")
    out = Path(shutil.copytree(there / "data", tmp_path / "data"))
    file, whole = out / "latents.json", (out / "latents.json").read_text()
    data = Prepared(out)
    for content, said in [
        ("[]", "is damaged"),
        (whole[:40], "is damaged"),
        (whole.replace("[", '["x", ', 1), "is damaged"),
        (json.dumps(json.loads(whole) | {"mean": [0.0] * 4}), "is damaged, or not of the latents beside it"),
        (json.dumps(json.loads(whole) | {"mean": [0.0] * 3}), "is of 3 channels, and .*vae has 4"),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=rf"latents.json {said}.*measures them anew, and encodes nothing"):
            _ = data.statistics
    save_vae(tmp_path / "other/vae", seed=1, std=0.3, scaling_factor=0.5, shift_factor=0.1)
    other = prepare(tmp_path / "other/data")
    sizes = [[file.stat().st_size for file in sorted(folder.glob("*.arrow"))] for folder in (out, other)]
    assert sizes[0] == sizes[1]  # so that they do not tell the two apart
    shutil.copy(other / "latents.json", file)
    with pytest.raises(UserError, match="not of the latents beside it"):
        _ = data.statistics
    assert [(found.path, found.mend) for found in verify(out) if found.damage] == [
        (file, "run the same `dic-repa prepare` again, which measures them anew")
    ]
    prepare(out)
    assert file.read_text() == whole
    assert not [found for found in verify(out) if found.damage]


def test_the_data_need_not_be_here_for_what_only_asks_for_shapes(there, tmp_path, here):
    gone = recipe(tmp_path / "gone", PER_CHANNEL)
    traits, why = data_traits(gone.data)
    assert (traits.channels, "gone" in why) == (4, True)
    (tmp_path / "mine.yaml").write_text(to_yaml(gone))
    assert "mine" in here("info", tmp_path / "mine.yaml")
    assert "the data is not here" in here("train", tmp_path / "mine.yaml", "--dry-run", "--set=train.batch_size=2")
    assert "latent.normalise" in here("recipes", "diff", tmp_path / "mine.yaml", "digits-urepa")


@pytest.mark.parametrize("setting", ["data.name=digits", "data.name=random"])
def test_data_without_latents(setting):
    options = ["data.options={channels: 1}"] if "random" in setting else []
    with pytest.raises(UserError, match=r"latent.normalise=per-channel.* (has no latents|are pixels); leave it out"):
        build_dataset(load_recipe("digits-urepa", [setting, PER_CHANNEL, *options]).data)


@pytest.fixture(scope="module")
def run(there, tmp_path_factory) -> tuple[RunFolder, Path]:
    """A run on latents of mean 0 and deviation 1, and a copy of its data, which is gone from its place by now."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        data = Path(shutil.copytree(there / "data", folder / "data"))
        run = train(recipe(data, PER_CHANNEL), folder / "run")
        data.rename(folder / "moved")
    return run, folder / "moved"


def pictures(folder) -> torch.Tensor:
    return torch.stack([load_png(file) for file in sorted(Path(folder).glob("0*.png"))])


@torch.no_grad()
def test_pictures_are_decoded_by_the_same_statistics_without_the_data(there, run, here, tmp_path):
    """By the run, what `convert` makes of it, and the diffusers folder: those of diffusers' own decoder."""
    from diffusers import AutoencoderKL, DiffusionPipeline

    run, data = run
    here("convert", run.path, tmp_path / "converted")
    sources = {"run": run.path, "converted": tmp_path / "converted"}
    for name, source in sources.items():
        here("sample", source, "--out", tmp_path / f"samples-{name}")
    assert torch.equal(pictures(tmp_path / "samples-run"), pictures(tmp_path / "samples-converted"))
    statistics, x = Prepared(data).statistics, torch.randn(2, 4, 16, 16)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (statistics.mean, statistics.std))
    vae = AutoencoderKL.from_pretrained(there / "vae")
    expected = (vae.decode(x * std + mean).sample / 2 + 0.5).clamp(0, 1)
    for source in sources.values():
        model = load(source)
        decoded = model.decode(x, output="pt")
        torch.testing.assert_close(
            decoded.float() / (255 if decoded.dtype == torch.uint8 else 1), expected, rtol=0, atol=0.003
        )
        image = torch.rand(1, 3, 32, 32)
        z = vae.encode(image * 2 - 1).latent_dist.mean
        torch.testing.assert_close(model.encode(image), (z - mean) / std, rtol=1e-4, atol=1e-4)
    here("export", run.path, tmp_path / "exported", "--format", "diffusers")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    torch.testing.assert_close(pipeline._decoder(torch.device("cpu"))(x), expected, rtol=1e-4, atol=1e-4)


def test_a_run_does_not_go_on_with_other_statistics(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run, data = run
    place = Path(shutil.copytree(data, run.path.parent / "data"))
    copy = Path(shutil.copytree(run.path, tmp_path / "run"))
    try:
        more = recipe(place, PER_CHANNEL, "train.steps=3", "train.checkpoint_every=1")
        assert train(more, copy, resume=True, allow_change=True).newest_checkpoint().name == "step_00000003"
        write_statistics(Prepared(place), LatentStatistics((0.0,) * 4, (1.0,) * 4))
        with pytest.raises(UserError, match=r"other statistics than those that .* was trained with"):
            train(more, copy, resume=True)
    finally:
        shutil.rmtree(place)


@torch.no_grad()
def test_latents_as_the_autoencoder_gives_them_need_no_data(there, tmp_path):
    from diffusers import AutoencoderKL

    gone = recipe(tmp_path / "gone", "latent.normalise=none", f"data.autoencoder={there / 'vae'}")
    autoencoder, x = build_autoencoder(gone.data), torch.randn(2, 4, 16, 16)
    expected = AutoencoderKL.from_pretrained(there / "vae").decode(x).sample / 2 + 0.5
    torch.testing.assert_close(autoencoder.decode(x), expected.clamp(0, 1), rtol=1e-5, atol=1e-5)
    assert autoencoder.spec.normalisation == "none"


def test_images_as_they_are_have_no_statistics(there):
    images = recipe(there / "tree", "data.name=images", f"data.autoencoder={there / 'vae'}", PER_CHANNEL)
    with pytest.raises(UserError, match="takes the statistics of a data set that `dic-repa prepare` has made"):
        build_autoencoder(images.data)
