"""The layouts of other projects, written from scratch, train the same model to the same losses as the prepared data."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import datasets
import numpy as np
import pytest
import torch
from pictures import save_vae, write_tree
from PIL import Image

from dic_repa.cli import main
from dic_repa.data.latent_files import DitLayout, RepaLayout
from dic_repa.data.latents import denoiser_data, global_noise
from dic_repa.data.sources import open_source
from dic_repa.errors import UserError
from dic_repa.recipe import validate
from dic_repa.recipe.build import build_class_names, build_dataset, build_decoder
from dic_repa.sampling.load import load
from dic_repa.training import train
from dic_repa.training.inputs import process_rows

SCALE, SHIFT = 0.5, 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tree/ and its preparation, and the same data in REPA's layout and in the DiC authors'. The posterior has almost
    no spread, since the latter's latents are drawn already.
    """
    folder = tmp_path_factory.mktemp("layouts")
    write_tree(folder / "tree", {"cat": 5, "dog": 7})
    save_vae(folder / "vae", std=1e-4, scaling_factor=SCALE, shift_factor=SHIFT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        arguments = ["--size=32", f"--autoencoder={folder / 'vae'}", "--shard-size=5"]
        with pytest.raises(SystemExit, match="0"):
            main(["prepare", str(folder / "tree"), str(folder / "prepared"), *arguments])
    rows = datasets.load_from_disk(folder / "prepared").with_format("numpy")
    for name in ("repa/images/00000", "repa/vae-sd/00000", "dit/toy_features", "dit/toy_labels"):
        (folder / name).mkdir(parents=True)
    labels = []
    for k, row in enumerate(rows):
        Image.fromarray(np.asarray(row["image"])).save(folder / f"repa/images/00000/img{k:08d}.png")
        moments, name = np.asarray(row["moments"], dtype=np.float32), f"00000/img-mean-std-{k:08d}.npy"
        np.save(folder / "repa/vae-sd" / name, moments)
        labels.append([name, int(row["label"])])
        np.save(folder / f"dit/toy_features/{k:03d}.npy", ((moments[:4] - SHIFT) * SCALE)[None])
        np.save(folder / f"dit/toy_labels/{k:03d}.npy", np.array([row["label"]]))
    (folder / "repa/vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def recipe(folder, name, path, steps=3, **data):
    return validate(
        {
            "model": {"name": "DiC", "width": 8, "depths": [1, 1, 1, 1, 1]},
            "data": {"name": name, "path": str(folder / path), "size": 16, "autoencoder": str(folder / "vae"), **data},
            "alignments": [],
            "train": {"steps": steps, "batch_size": 8, "log_every": 1, "sample_every": 0},
            "optimizer": {"learning_rate": 1e-3},
            "sample": {"solver": "euler", "steps": 2, "num": 2, "batch_size": 2},
        }
    )


def losses(folder, tmp_path, name, path, **data):
    run = train(recipe(folder, name, path, **data), tmp_path / name)
    return [json.loads(line)["loss"] for line in run.metrics_file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_all_layouts_train_to_the_same_losses(folder, tmp_path):
    prepared = losses(folder, tmp_path, "prepared", "prepared")
    assert len(set(prepared)) == 3
    assert losses(folder, tmp_path, "repa", "repa") == prepared  # the same moments and the same noise: bit for bit
    drawn = losses(folder, tmp_path, "dit", "dit", options={"num_classes": 2})
    np.testing.assert_allclose(drawn, prepared, rtol=1e-3)  # the posterior's spread is left
    encoded = losses(folder, tmp_path, "images", "tree")
    np.testing.assert_allclose(encoded, prepared, rtol=5e-3)  # the moments' rounding to float16 is left


def test_decoding_is_diffusers(folder, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    settings = recipe(folder, "repa", "repa", steps=1)
    x = torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (vae.decode(x / SCALE + SHIFT).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(build_decoder(settings.data)(x), expected, atol=1e-5, rtol=1e-4)
    run = train(settings, tmp_path / "run")
    sampler = load(run.path).sampler(settings.sample)
    assert next(iter(sampler(torch.tensor([0, 1])))).shape == (2, 3, 32, 32)


def test_posterior_noise_is_the_global_batch_cut_to_rows(folder):
    data = RepaLayout(folder / "repa", 16, autoencoder=str(folder / "vae"))
    mean, std = torch.randn(6, 4, 16, 16), torch.rand(6, 4, 16, 16)
    batch = {"moments": torch.cat([mean, std], dim=1).half()}

    def draw(rows):
        part = {"moments": batch["moments"][rows]}
        return denoiser_data(data, part, global_noise(6, rows, torch.Generator().manual_seed(3)))

    whole = draw(slice(0, 6))
    torch.testing.assert_close(torch.cat([draw(process_rows(6, k, 3)) for k in range(3)]), whole, rtol=0, atol=0)
    noise = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    expected = (mean.half().float() + std.half().float() * noise - SHIFT) * SCALE
    torch.testing.assert_close(whole, expected)


def test_zips_are_read_as_folders(folder, tmp_path):
    for part in ("images", "vae-sd"):
        shutil.make_archive(str(tmp_path / part), "zip", folder / "repa" / part)
    zipped = RepaLayout(tmp_path, 16, autoencoder=str(folder / "vae"))
    loose = RepaLayout(folder / "repa", 16, autoencoder=str(folder / "vae"))
    assert len(zipped) == len(loose) == 12
    for k in (0, 11):
        assert int(zipped[k]["label"]) == int(loose[k]["label"]) == int(k >= 5)
        torch.testing.assert_close(zipped[k]["moments"], loose[k]["moments"])
        torch.testing.assert_close(zipped[k]["image"], loose[k]["image"])


def test_a_changed_image_of_repas_layout_makes_a_feature_cache_stale(folder, tmp_path):
    shutil.copytree(folder / "repa", tmp_path / "repa")
    before = RepaLayout(tmp_path / "repa", 16).fingerprint
    assert RepaLayout(tmp_path / "repa", 16).fingerprint == before
    Image.new("RGB", (32, 32)).save(tmp_path / "repa/images/00000/img00000007.png")
    assert RepaLayout(tmp_path / "repa", 16).fingerprint != before


def test_latents_without_images_cannot_be_aligned(folder, tmp_path):
    settings = recipe(folder, "dit", "dit")
    settings.alignments = validate({"alignments": [{"encoder": "digits-vit"}]}).alignments
    with pytest.raises(UserError, match="latents but no images"):
        train(settings, tmp_path / "run")


def test_what_is_wrong_with_a_layout_is_said(folder, tmp_path):
    with pytest.raises(UserError, match=r"neither images/ nor images.zip"):
        RepaLayout(folder / "dit", 16)
    with pytest.raises(UserError, match=r"one folder \*_features, and holds 0"):
        DitLayout(folder / "repa", 16)
    with pytest.raises(UserError, match=r"data.size is 32, but .* holds 16x16"):
        RepaLayout(folder / "repa", 32)
    with pytest.raises(UserError, match="the label 1, which is beyond num_classes 1"):
        RepaLayout(folder / "repa", 16, num_classes=1)
    shutil.copytree(folder / "repa", tmp_path / "repa")
    labels = tmp_path / "repa/vae-sd/dataset.json"
    table = json.loads(labels.read_text())["labels"]
    labels.write_text(json.dumps({"labels": [[table[0][0], -1], *table[1:]]}))
    with pytest.raises(UserError, match="the label -1"):
        RepaLayout(tmp_path / "repa", 16)
    labels.write_text(json.dumps({"labels": table[1:]}))
    with pytest.raises(UserError, match=r"dataset.json: 1 \(00000/img-mean-std-00000000.npy\) is not in it"):
        RepaLayout(tmp_path / "repa", 16)
    (tmp_path / "repa/images/00000/img00000000.png").unlink()
    with pytest.raises(UserError, match="11 images and 12 moments"):
        RepaLayout(tmp_path / "repa", 16)
    shutil.copytree(folder / "dit", tmp_path / "dit")
    (tmp_path / "dit/toy_labels/004.npy").unlink()
    with pytest.raises(UserError, match=r"misses the labels of 1 files, such as 004.npy"):
        DitLayout(tmp_path / "dit", 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named_in_one_line(folder, tmp_path, workers):
    shutil.copytree(folder / "repa", tmp_path / "repa")
    moments = tmp_path / "repa/vae-sd/00000/img-mean-std-00000003.npy"
    os.truncate(moments, 2 * 10**9)  # a hole, no room on the disk
    settings = recipe(tmp_path, "repa", "repa", workers=workers, autoencoder=str(folder / "vae"))
    with pytest.raises(UserError, match=r"^[^\n]*img-mean-std-00000003\.npy in bytes is 2,000,000,000, over [^\n]*$"):
        train(settings, tmp_path / "run")
    Image.new("RGB", (30, 32)).save(tmp_path / "repa/images/00000/img00000002.png")
    with pytest.raises(UserError, match=r"img00000002.png is 3x32x30, the first image 3x32x32"):
        RepaLayout(tmp_path / "repa", 16)[2]


def test_an_encrypted_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("cat/0.png", b"secret")
    content = bytearray((tmp_path / "locked.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1  # the flag that says so
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"cat/0.png cannot be read .*encrypted"):
        open_source(tmp_path / "locked.zip").load(0)


def test_pickled_arrays_are_refused(folder, tmp_path):
    shutil.copytree(folder / "dit", tmp_path / "dit")
    np.save(tmp_path / "dit/toy_labels/000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"not a whole .npy file of numbers"):
        DitLayout(tmp_path / "dit", 16)[0]


def test_the_data_block_says_what_does_not_fit():
    def build(**data):
        return build_dataset(validate({"data": data}).data)

    with pytest.raises(UserError, match="path"):
        build(name="prepared", size=16)
    with pytest.raises(UserError, match="'flop'"):
        build(name="images", path="x", size=16, options={"flop": True})
    with pytest.raises(UserError, match="labels takes a text or null, not 5"):
        build(name="images", path=".", size=16, options={"labels": 5})
    with pytest.raises(UserError, match="unknown data set 'prepard'; did you mean prepared"):
        build(name="prepard")
    assert len(build(name="digits", size=16)) == 8000


def test_class_names_where_the_data_is_elsewhere(folder):
    section = recipe(folder, "prepared", "prepared").data
    assert build_class_names(section, 2) == ("cat", "dog")
    section.path = "./elsewhere"
    assert build_class_names(section, 2) == ("0", "1")


def test_images_as_pixels_and_mirrored(folder):
    section = validate(
        {"data": {"name": "images", "path": str(folder / "tree"), "size": 24, "options": {"flip": True}}}
    )
    data = build_dataset(section.data)
    assert (len(data), data.channels, data.num_classes) == (24, 3, 2)
    torch.testing.assert_close(data[13]["image"], data[1]["image"].flip(-1))
    assert data[1]["image"].shape == (3, 24, 24)
    batch = {"image": torch.rand(2, 3, 24, 24)}
    pixels = denoiser_data(data, batch, global_noise(2, slice(0, 2), torch.Generator()))
    torch.testing.assert_close(pixels, batch["image"] * 2 - 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_stops_the_run_in_one_line(folder, tmp_path, workers):
    shutil.copytree(folder / "tree", tmp_path / "tree")
    file = tmp_path / "tree/cat/002.png"
    file.write_bytes(file.read_bytes()[:100])
    settings = recipe(tmp_path, "images", "tree", autoencoder="none", workers=workers)
    with pytest.raises(UserError, match=r"^cat/002\.png is not a whole image \([^\n]*$"):
        train(settings, tmp_path / "run")


def test_bench_data(folder, tmp_path, monkeypatch, capsys):
    from dic_repa.recipe import to_yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(to_yaml(recipe(folder, "prepared", "prepared")))
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "data", "r.yaml", "--samples=8", "--steps=2", "--json"])
    result = json.loads(capsys.readouterr().out)
    speeds, ratios = result["images_per_second"], result["to_loose_files"]
    assert 0 <= result["waiting_share"] <= 1
    assert {name.split(",")[0] for name in speeds} == {"loose files", "prepare", "loader"}
    assert len(speeds) == 4  # prepare without and with the autoencoder
    assert ratios["loader"] == pytest.approx(speeds["loader"] / speeds["loose files"])


@pytest.mark.parametrize("name", ["prepared", "repa"])
def test_images_that_nobody_looks_at_are_left_out(folder, name):
    data = build_dataset(recipe(folder, name, name).data)
    whole = data[3]
    data.with_images = False
    assert data[3].keys() == whole.keys() - {"image"}
    torch.testing.assert_close(data[3]["moments"], whole["moments"])
