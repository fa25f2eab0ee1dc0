"""`dic-repa prepare`: what it writes is what diffusers computes, whole after kills, the same from two processes."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from pictures import as_file, picture, save_vae, write_tree
from prepare_slowly import run as prepare_quickly
from small_runs import full_disk
from torch.utils.data import DataLoader

from dic_repa.cli import main
from dic_repa.conditions import ClassLabels
from dic_repa.data.images import center_crop, to_tensor
from dic_repa.data.latents import denoiser_data
from dic_repa.data.look_back import psnr
from dic_repa.data.prepared import Prepared
from dic_repa.data.sources import ImageFolder
from dic_repa.errors import UserError
from dic_repa.files.pictures import unit_images
from dic_repa.recipe import load_training_recipe
from dic_repa.recipe.build import build_dataset, build_denoiser
from dic_repa.sampling.load import check_recipe


@pytest.fixture(autouse=True)
def _on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def prepared(tmp_path):
    """A tree of 7 images and its preparation, with mirrored moments, in shards of 3."""
    write_tree(tmp_path / "tree", {"cat": 2, "dog": 5})
    save_vae(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.1)
    prepare("tree", "out", "--flip")
    return tmp_path / "out"


def prepare(source, destination, *options, size=32, autoencoder="vae") -> None:
    arguments = ["prepare", source, destination, f"--size={size}", f"--autoencoder={autoencoder}", "--shard-size=3"]
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in [*arguments, *options]])
    assert exit.value.code == 0


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.arrow"))}


@torch.no_grad()
def test_rows_are_what_diffusers_computes(prepared, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    data = datasets.load_from_disk(prepared)
    assert data.features["label"].names == ["cat", "dog"]
    assert data["label"] == [0, 0, 1, 1, 1, 1, 1]
    assert data["name"][2] == "dog/000.png"
    assert (data["width"][0], data["height"][0]) == (50, 40)
    for k, row in enumerate(data.with_format("numpy")):
        crop = center_crop(picture(k), 32)
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(crop))
        for column, image in (("moments", to_tensor(crop)), ("moments_flipped", to_tensor(crop).flip(-1))):
            posterior = vae.encode(image[None] * 2 - 1).latent_dist
            expected = torch.cat([posterior.mean, posterior.std], dim=1)[0]
            assert data.features[column].dtype == "float16"
            np.testing.assert_allclose(row[column], expected.numpy(), rtol=2e-3, atol=1e-4)


@torch.no_grad()
def test_check_at_the_end(prepared, tmp_path):
    from diffusers import AutoencoderKL

    report = json.loads((prepared / "check.json").read_text())
    assert report["images"] == report["expected"] == 7
    assert report["smallest_class"] == ["cat", 2]
    assert report["largest_class"] == ["dog", 5]
    assert (prepared / "preview.png").is_file()
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    images = torch.stack([to_tensor(center_crop(picture(k), 32)) for k in range(7)])
    decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    errors = ((images - decoded) ** 2).mean(dim=(1, 2, 3)).numpy()
    assert report["psnr"] == pytest.approx(np.mean(10 * np.log10(1 / errors)), abs=0.02)


def test_samples(prepared, tmp_path):
    data = Prepared(prepared, size=16)
    assert (len(data), data.num_classes, data.channels, data.class_names) == (14, 2, 4, ("cat", "dog"))
    stored = datasets.load_from_disk(prepared).with_format("numpy")
    for k in range(14):
        row, sample = stored[k % 7], data[k]
        image = torch.from_numpy(np.asarray(row["image"]).copy()).permute(2, 0, 1)
        torch.testing.assert_close(sample["image"], image if k < 7 else image.flip(-1))
        moments = row["moments" if k < 7 else "moments_flipped"]
        np.testing.assert_array_equal(sample["moments"].numpy(), np.asarray(moments))
        assert int(sample["label"]) == row["label"]
    with pytest.raises(IndexError):
        data[14]
    assert len(Prepared(prepared, size=16, flip=False)) == 7
    plain = Path(shutil.copytree(prepared, tmp_path / "plain"))
    (plain / "prepare.json").write_text((plain / "prepare.json").read_text().replace('"flip": true', '"flip": false'))
    assert len(Prepared(plain, size=16)) == 7
    with pytest.raises(UserError, match=r"plain holds no mirrored images, .* prepare it with --flip"):
        Prepared(plain, size=16, flip=True)


def test_fingerprint_tells_changed_images_and_mirrored_ones(tmp_path):
    write_tree(tmp_path / "tree", {"cat": 2})
    prepare("tree", "pixels", size=24, autoencoder="none")
    before = Prepared("pixels", size=24).fingerprint
    assert Prepared("pixels", size=24).fingerprint == before
    folder = ImageFolder("tree", size=24).fingerprint
    assert ImageFolder("tree", size=24, flip=True).fingerprint != folder
    picture(9, (24, 24)).save(tmp_path / "tree/cat/001.png")  # the same names and labels, another image
    shutil.rmtree("pixels")
    prepare("tree", "pixels", size=24, autoencoder="none")
    assert Prepared("pixels", size=24).fingerprint != before
    assert ImageFolder("tree", size=24).fingerprint != folder


@pytest.mark.slow
def test_spawned_workers_read_the_same(prepared):
    data = Prepared(prepared, size=16)
    data[0]  # the files are mapped before the worker takes its copy
    loader = DataLoader(data, batch_size=14, num_workers=1, multiprocessing_context="spawn")
    batch = next(iter(loader))
    torch.testing.assert_close(batch["moments"], torch.stack([data[k]["moments"] for k in range(14)]))


@pytest.mark.parametrize("column", ["image", "moments", "moments_flipped", "label"])
def test_a_bit_that_flips_in_a_shard_is_found_when_it_is_read(prepared, column):
    data = Prepared(prepared)
    rows = datasets.load_from_disk(prepared).with_format("arrow")[:].to_pydict()
    value = rows[column][4]
    if column == "image":
        value = value["bytes"]
    elif column == "label":
        value = np.array(rows["label"][3:6]).tobytes()
    else:
        value = np.array(value, "<f2").tobytes()
    file = sorted(prepared.glob("*.arrow"))[1]
    content = bytearray(file.read_bytes())
    content[content.index(value) + len(value) // 2] ^= 1
    file.write_bytes(content)
    data = Prepared(prepared)
    index = 4 + 7 * (column == "moments_flipped")
    assert data[2]["label"] == 1  # of another row
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{file} is damaged: the {column} of its row 1 has changed .*; remove"):
            data[index]
    file.unlink()
    prepare("tree", "out", "--flip")
    assert [int(sample["label"]) for sample in Prepared(prepared)] == 2 * [0, 0, 1, 1, 1, 1, 1]


def test_an_earlier_version_without_checksums(prepared, monkeypatch):
    """Its data is read, and an interrupted preparation goes on with shards like those that are there."""
    with monkeypatch.context() as patch:
        patch.setattr("dic_repa.data.prepare.FORMAT", 1)
        prepare("tree", "old", "--flip")
    (file,) = Path("old").glob("data-00001-*")
    whole = file.read_bytes()
    file.unlink()
    prepare("tree", "old", "--flip")
    assert file.read_bytes() == whole
    assert "crc32" not in datasets.load_from_disk("old").features
    for old, new in zip(Prepared("old"), Prepared(prepared), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_pixels(tmp_path):
    write_tree(tmp_path / "tree", {"cat": 1, "dog": 3})
    prepare("tree", "pixels", size=24, autoencoder="none")
    data = Prepared("pixels", size=24)
    assert set(datasets.load_from_disk("pixels").column_names) == {"image", "label", "name", "width", "height", "crc32"}
    torch.testing.assert_close(unit_images(data[3]["image"]), to_tensor(center_crop(picture(3), 24)))
    assert data.channels == 3


def test_finished_shards_are_not_done_again(prepared):
    before = shards(prepared)
    assert len(before) == 3
    removed = prepared / "data-00001-of-00003.arrow"
    removed.unlink()
    times = {file.name: file.stat().st_mtime_ns for file in prepared.glob("*.arrow")}
    prepare("tree", "out", "--flip")
    assert {name: (prepared / name).stat().st_mtime_ns for name in times} == times
    assert shards(prepared) == before


@pytest.mark.slow
def test_killed_five_times(tmp_path):
    write_tree(tmp_path / "tree", {"a": 50, "b": 30})
    prepare_quickly(tmp_path / "tree", tmp_path / "whole", seconds=0)
    expected, chance = shards(tmp_path / "whole"), random.Random(0)
    assert len(expected) == 20
    forks, out, progress = multiprocessing.get_context("fork"), tmp_path / "killed", []
    for _ in range(5):
        process = forks.Process(target=prepare_quickly, args=(tmp_path / "tree", out, 0.12))
        process.start()
        had = len(list(out.glob("data-*.arrow")))
        while len(list(out.glob("data-*.arrow"))) == had and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.25))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        progress.append(len(list(out.glob("data-*.arrow"))))
        assert not (out / "state.json").exists()
    assert progress == sorted(set(progress))
    assert progress[-1] < 20
    prepare_quickly(tmp_path / "tree", out, seconds=0)
    assert shards(out) == expected
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}


@pytest.mark.slow
def test_two_processes_give_the_same(prepared, tmp_path, dic_repa):
    arguments = ["prepare", "tree", "two", "--size=32", "--autoencoder=vae", "--shard-size=3", "--flip"]
    done = dic_repa(*arguments, processes=2)
    assert done.stdout.count("7 of 7 images") == 1
    assert len(shards(prepared)) == 3
    assert shards(tmp_path / "two") == shards(prepared)
    assert (tmp_path / "two/latents.json").read_bytes() == (prepared / "latents.json").read_bytes()


@pytest.mark.slow
def test_a_bad_file_of_another_process_is_named(tmp_path, dic_repa):
    write_tree(tmp_path / "tree", {"cat": 3, "dog": 3})
    (tmp_path / "tree/dog/001.png").write_bytes(as_file(picture(0))[:60])
    arguments = ["prepare", "tree", "out", "--size=16", "--autoencoder=none", "--shard-size=3"]
    done = dic_repa(*arguments, processes=2, check=False)
    assert done.returncode
    assert done.stderr.count("error: dog/001.png is not a whole image") == 1


def test_bad_files_are_named_and_counted(tmp_path, capsys):
    write_tree(tmp_path / "tree", {"cat": 3, "dog": 4})
    (tmp_path / "tree/dog/001.png").write_bytes(as_file(picture(0))[:60])
    (tmp_path / "tree/dog/notes.png").write_text("not a picture")
    arguments = ["prepare", "tree", "out", "--size=16", "--autoencoder=none", "--shard-size=3"]
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: dog/001.png is not a whole image")
    assert line.endswith("restore it, or pass --skip-bad")
    assert not (tmp_path / "out/state.json").exists()
    assert all(datasets.Dataset.from_file(str(file)).num_rows == 3 for file in (tmp_path / "out").glob("*.arrow"))
    assert not list((tmp_path / "out").glob(".writing-*"))
    prepare("tree", "out", "--skip-bad", size=16, autoencoder="none")
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert report["skipped"] == ["dog/001.png", "dog/notes.png"]
    assert (report["images"], report["expected"]) == (6, 8)
    assert len(Prepared("out", size=16)) == 6


def test_summary_counts_the_classes(tmp_path, capsys):
    for classes, said in (
        ({"a": 3}, "3 of 3 images, 1 class (a)"),
        ({"a": 2, "b": 2}, "4 of 4 images, 2 classes of 2 images each"),
        ({"a": 1, "b": 2}, "3 of 3 images, 2 classes from 1 (a) to 2 (b) images"),
    ):
        name = "".join(f"{key}{count}" for key, count in classes.items())
        write_tree(tmp_path / name, classes)
        prepare(name, f"{name}-out", autoencoder="none")
        assert f"{name}-out: {said}\n" in capsys.readouterr().out


def test_small_images_and_emptied_classes_are_reported(tmp_path):
    write_tree(tmp_path / "tree", {"cat": 4, "dog": 1}, size=(12, 20))
    (tmp_path / "tree/dog/000.png").write_bytes(b"no image")
    prepare("tree", "out", "--skip-bad", size=16, autoencoder="none")
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert report["enlarged"] == 4
    assert report["empty_classes"] == ["dog"]


def test_moments_are_kept_in_float32_on_request(prepared, tmp_path, mistake, capsys):
    """REPA's are float32: halved they are ours, and the denoiser's data is what they say to the last digit."""
    options = ["--moments", "float32", "--flip"]
    prepare("tree", "full", *options)
    capsys.readouterr()
    half, full = Prepared(prepared, size=16), Prepared(tmp_path / "full", size=16)
    assert full[0]["moments"].dtype == torch.float32
    for k in range(len(full)):
        assert torch.equal(full[k]["moments"].half(), half[k]["moments"])
    batch = {"moments": torch.stack([full[k]["moments"] for k in range(3)])}
    assert not torch.equal(batch["moments"], batch["moments"].half().float())
    mean, std = batch["moments"].chunk(2, dim=1)
    expected = (mean + std - 0.1) * 0.5  # the vae's shift and scale
    torch.testing.assert_close(denoiser_data(full, batch, torch.ones_like), expected, rtol=1e-6, atol=1e-6)
    again = ["prepare", "tree", "full", "--shard-size=3", "--autoencoder=vae", "--size=32", "--flip"]
    assert "another moments; choose" in mistake(*again)


def test_weights_are_converted_whatever_images_are_mirrored(prepared, tmp_path):
    """Only training asks for mirrored images: the data that is here need not have them for weights to fit."""
    settings = (prepared / "prepare.json").read_text()
    (prepared / "prepare.json").write_text(settings.replace('"flip": true', '"flip": false'))
    (tmp_path / "mine.yaml").write_text(
        f"model: {{name: DiC, width: 8, depths: [1, 1, 1, 1, 1]}}\n"
        f"data: {{name: prepared, path: '{prepared}', size: 16, options: {{flip: true}}}}\n"
    )
    recipe = load_training_recipe(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="prepare it with --flip"):
        build_dataset(recipe.data)
    check_recipe(recipe, build_denoiser(recipe.model, 4, ClassLabels(2)))


def test_a_folder_from_before_the_choice_of_moments_goes_on(prepared):
    settings = json.loads((prepared / "prepare.json").read_text())
    del settings["moments"]
    (prepared / "prepare.json").write_text(json.dumps(settings))
    prepare("tree", "out", "--flip")


def test_another_preparation_is_not_mixed_in(prepared, tmp_path, mistake):
    again = ["prepare", "tree", "out", "--shard-size=3", "--autoencoder=vae"]
    assert "another size; choose" in mistake(*again, "--size=24", "--flip")
    assert "another flip; choose" in mistake(*again, "--size=32")
    save_vae(tmp_path / "other", seed=1, scaling_factor=0.5, shift_factor=0.1)
    assert "another autoencoder; choose" in mistake(*again, "--size=32", "--flip", "--autoencoder=other")
    picture(99).save(tmp_path / "tree/cat/new.png")
    assert "another source; choose" in mistake(*again, "--size=32", "--flip")
    assert "vae is not a prepared data set" in mistake("prepare", "tree", "vae", "--autoencoder=none", "--size=32")
    assert "not a multiple of 2" in mistake("prepare", "tree", "odd", "--autoencoder=vae", "--size=33")


def test_data_of_another_autoencoder_or_size(prepared, tmp_path):
    with pytest.raises(UserError, match=r"data.size is 32, but .* holds 16x16"):
        Prepared(prepared, size=32)
    save_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"was prepared with the autoencoder .*, not with other"):
        Prepared(prepared, size=16, autoencoder="other")
    (tmp_path / "vae").rename(tmp_path / "moved")
    assert Prepared(prepared, size=16, autoencoder="moved").autoencoder.spec.scale == (0.5,) * 4
    (prepared / "state.json").unlink()
    with pytest.raises(UserError, match="was not finished"):
        Prepared(prepared, size=16)
    with pytest.raises(UserError, match="not a prepared data set"):
        Prepared(tmp_path, size=16)


def test_autoencoder_that_cannot_be_had(tmp_path, mistake, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_tree(tmp_path / "tree", {"cat": 1})
    line = mistake("prepare", "tree", "out")
    assert "stabilityai/sd-vae-ft-ema cannot be fetched" in line
    assert "diffusion_pytorch_model.safetensors" in line
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert "empty holds no autoencoder" in mistake("prepare", "tree", "out", "--autoencoder=empty")
    assert "there is no autoencoder" in mistake("prepare", "tree", "out", "--autoencoder=./nowhere")


def test_full_disk_leaves_nothing_half_written(tmp_path):
    write_tree(tmp_path / "tree", {"cat": 8})
    with full_disk(9000), pytest.raises(UserError, match=r"data-00000-of-00002.arrow could not be written .*make room"):
        prepare_quickly(tmp_path / "tree", tmp_path / "out", seconds=0)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {".dic-repa.jsonl", "prepare.json"}


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(a, a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)), torch.tensor([20.0, 40.0]))
