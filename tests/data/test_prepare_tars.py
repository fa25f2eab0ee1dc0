"""`dic-repa prepare --format webdataset`: sample by sample the Arrow form, whole after a stop, and trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import save_vae, write_tree
from small_runs import small_recipe, small_run

from dic_repa.cli import main
from dic_repa.data import Prepared, WebDataset
from dic_repa.data.tar_shards import read_rows
from dic_repa.errors import UserError
from dic_repa.evaluation.image_sets import open_images
from dic_repa.recipe.build import build_dataset
from dic_repa.sampling.verify import verify

OPTIONS = ["--size=32", "--shard-size=3", "--flip"]


@pytest.fixture(autouse=True, scope="module")
def _on_the_cpu(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tars"))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("XDG_CACHE_HOME", str(Path.cwd() / "cache"))
        yield


@pytest.fixture(scope="module")
def tars(_on_the_cpu):
    """A tree of 7 images, and its preparations `arrow` and `tars` in the current folder."""
    write_tree(Path("tree"), {"cat": 2, "dog": 5})
    save_vae(Path("vae"), scaling_factor=0.5, shift_factor=0.1)
    prepare("tree", "arrow", "--autoencoder=vae")
    prepare("tree", "tars", "--autoencoder=vae", "--format=webdataset")
    return Path("tars")


def prepare(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["prepare", *arguments, *OPTIONS])
    assert exit.value.code == code


def test_both_forms_hold_the_same(tars):
    arrow, data = Prepared("arrow"), WebDataset(tars)
    rows = [row for k in range(3) for row in read_rows(tars / f"data-0000{k}-of-00003.tar")]
    sources = [f"{folder}/{k:03d}.png" for folder, count in (("cat", 2), ("dog", 5)) for k in range(count)]
    order = [sources.index(row["name"]) for row in rows]
    assert sorted(order) == list(range(7)) != order  # mixed, since few shards are at hand in training
    assert (len(data), data.size, data.class_names, data.spec) == (14, 16, ("cat", "dog"), arrow.spec)
    for place, picture in enumerate(order):
        for index, other in ((place, picture), (7 + place, 7 + picture)):
            ours, theirs = data[index], arrow[other]
            assert torch.equal(ours["image"], theirs["image"])
            assert ours["label"] == theirs["label"]
            # They are encoded in other batches, which may change a last digit.
            torch.testing.assert_close(ours["moments"], theirs["moments"], rtol=2e-3, atol=1e-5)
    for ours, theirs in zip(
        (data.statistics.mean, data.statistics.std), (arrow.statistics.mean, arrow.statistics.std), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    same = {"images", "smallest_class", "largest_class", "empty_classes", "enlarged", "expected"}
    reports = [json.loads(Path(folder, "check.json").read_text()) for folder in ("arrow", "tars")]
    assert {key: reports[0][key] for key in same} == {key: reports[1][key] for key in same}
    assert reports[0]["psnr"] == pytest.approx(reports[1]["psnr"], abs=1e-3)
    assert WebDataset.autoencoder_of("tars") == arrow.spec.name


def test_a_stopped_preparation_goes_on_to_the_same_bytes(tars):
    before = {file.name: file.read_bytes() for file in tars.iterdir() if file.suffix in (".tar", ".json")}
    again = Path(shutil.copytree(tars, "again"))
    for name in ("data-00001-of-00003.tar", "index.json"):
        (again / name).unlink()
    with pytest.raises(UserError, match=r"there is no shard again/data-00001-of-00003.tar"):
        WebDataset("again/data-{00000..00002}-of-00003.tar", size=16)
    prepare("tree", "again", "--autoencoder=vae", "--format=webdataset")
    for name, content in before.items():
        assert name == "check.json" or (again / name).read_bytes() == content
    prepare("tree", "again", "--autoencoder=vae", code=2)  # it was begun in the other form


def test_damage_is_found(tars, capsys):
    damaged = Path(shutil.copytree(tars, "damaged"))
    file = damaged / "data-00000-of-00003.tar"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"VP8L", b"VP8X", 1))
    assert [finding.path.name for finding in verify(tars) if finding.damage] == []
    [found] = [finding for finding in verify(damaged) if finding.damage]
    assert (found.path, found.damage) == (file, "000000000.webp has changed since it was prepared")
    file.write_bytes(content[:-5000])
    with pytest.raises(UserError, match=r"data-00000-of-00003.tar has .* bytes instead of the .* of its index"):
        WebDataset(damaged)
    with pytest.raises(UserError, match=r"tars holds tar shards, which data.name=webdataset reads"):
        Prepared(tars)


def test_what_trains_and_what_is_measured(tars):
    keys = ["data={name: webdataset, path: tars, size: 16}", "latent.normalise=per-channel", "alignments=[]"]
    small_run(Path("run"), *keys, "train.steps=1", "train.checkpoint_every=1")
    data = build_dataset(small_recipe(*keys).data)
    assert data.spec.normalisation == "per-channel"
    assert len(open_images("tars")) == 7
