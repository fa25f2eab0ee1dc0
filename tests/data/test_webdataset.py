"""Data sets of tar shards, on a disk and at an address: their samples, their order, and what is wrong with them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from pictures import picture, save_vae
from places import SCRIPTS
from small_runs import small_recipe, small_run
from tar_sets import make_samples, serve, write_set, write_tar

import dic_repa.files.remote as remote
from dic_repa.alignment.cache import WithTokens
from dic_repa.data import WebDataset
from dic_repa.errors import UserError
from dic_repa.recipe.build import build_dataset
from dic_repa.training.inputs import Batches, data_order


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Ten shards of two to four samples each."""
    return write_set(tmp_path_factory.mktemp("sets") / "ten", *[2, 3, 4, 3, 3, 2, 4, 3, 3, 3])


@pytest.fixture
def server(shards):
    with serve(shards) as running:
        yield running


def write_index(folder, counts) -> None:
    names = sorted(file.name for file in folder.glob("*.tar"))
    entries = [{"url": name, "nsamples": count} for name, count in zip(names, counts, strict=True)]
    (folder / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": entries}))


def test_samples_are_what_hugging_face_reads(tmp_path):
    """`datasets` has a reader of this format, which shares nothing with ours."""
    save_vae(tmp_path / "vae")
    folder = write_set(tmp_path / "set", 3, 2, channels=8)
    data = WebDataset(folder, size=8, autoencoder=str(tmp_path / "vae"))
    files = [str(file) for file in sorted(folder.glob("*.tar"))]
    theirs = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    assert len(data) == len(theirs) == 5
    for sample, row in zip(data, theirs):
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), np.asarray(row["png"]))
        np.testing.assert_array_equal(sample["moments"], np.asarray(row["npy"], dtype="f2"))
        assert int(sample["label"]) == row["cls"]
    assert (data.num_classes, data.labels.tolist()) == (5, [0, 1, 2, 3, 4])
    data.with_images = False
    assert data[0].keys() == {"label", "moments"}


def test_names_folders_and_what_is_passed_over(tmp_path):
    """A name ends at the first dot behind the last slash; the same folder in two forms; pictures are cropped."""
    files = make_samples(1, size=32)["00000"]
    samples = {"./a.b/x": files | {"json": b"{}", "seg.png": b"?"}, "a.b/y": files | {"JPG": files["png"]}}
    del samples["a.b/y"]["png"]
    write_tar(tmp_path / "set/one.tar", samples)
    data = WebDataset(tmp_path / "set/one.tar", size=16)
    assert len(data) == 2
    assert data[1]["image"].shape == (3, 16, 16)
    write_tar(tmp_path / "set/two.tar", {"z": files})
    assert [len(WebDataset(tmp_path / path, size=16)) for path in ("set", "set/{one..two}.tar"[:3])] == [3, 3]


def test_an_epoch_is_a_permutation_from_few_shards_at_any_moment(shards):
    data = WebDataset(f"{shards}/{{00..09}}.tar", size=16, shuffle_shards=3, flip=True)
    order = list(itertools.islice(data_order(3, len(data), 5, permutation=data.permutation), 24))
    epochs = np.array(order).reshape(2, 60)
    assert all(sorted(epoch) == list(range(60)) for epoch in epochs.tolist())
    assert (epochs[0] != epochs[1]).any()
    resumed = data_order(3, len(data), 5, start_step=15, permutation=data.permutation)
    assert list(itertools.islice(resumed, 9)) == order[15:]
    of_shard = np.repeat(np.arange(10), data.store.counts)[epochs[0] % 30]
    for shard in range(10):  # it comes within a stretch of three tenths of the epoch, whose end joins its beginning
        places = np.flatnonzero(of_shard == shard)
        gaps = np.diff([*places, places[0] + 60])
        assert 60 - gaps.max() <= 60 * 0.3 + 8  # shards differ in size
    assert len({*of_shard[:12]}) >= 3  # nor is the beginning of an epoch from fewer
    assert WithTokens(data, {}).permutation == data.permutation
    whole = WebDataset(shards, size=16)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    np.testing.assert_array_equal(whole.permutation(generators[0]), torch.randperm(30, generator=generators[1]))


def test_two_processes_share_each_batch_and_loaders_change_nothing(shards):
    recipe = small_recipe("data.name=webdataset", f"data.path={shards}", "data.options={shuffle_shards: 3}")

    def read(process: int, processes: int, workers: int) -> list[list[int]]:
        recipe.data.workers = workers
        accelerator = SimpleNamespace(process_index=process, num_processes=processes, device=torch.device("cpu"))
        batches = Batches(build_dataset(recipe.data), recipe, accelerator, start=2)
        found = [batch["label"].tolist() for batch in itertools.islice(batches, 10)]
        batches.close()
        return found

    alone = read(0, 1, workers=0)
    assert [a + b for a, b in zip(read(0, 2, 0), read(1, 2, 2))] == alone


@pytest.mark.slow
def test_killed_and_resumed_no_sample_is_lost_or_doubled(server, tmp_path):
    """By address, with three shards at hand; the process gets a SIGKILL before its seventh step."""
    keys = ["data.name=webdataset", f"data.path={server.address}/{{00..09}}.tar", "train.checkpoint_every=3"]
    keys += ["data.options={shuffle_shards: 2, keep_shards: 3}", "train.batch_size=5", "train.steps=12"]
    seen = tmp_path / "seen.txt"
    command = [sys.executable, SCRIPTS / "killed_run.py", tmp_path / "run", seen, 7, *keys]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [list(map(int, line.split())) for line in seen.read_text().splitlines()]
    steps = {step: labels for step, *labels in lines}
    assert all(steps[step] == labels for step, *labels in lines)  # what came twice, after a checkpoint, is the same
    assert {len(lines) - 12} <= {0, 1, 2, 3}
    stream = list(itertools.chain(*(steps[k] for k in range(1, 13))))
    assert sorted(stream[:30]) == sorted(stream[30:]) == list(range(30))
    assert len(list((tmp_path / "cache/dic-repa/shards").rglob("*.tar"))) <= 3


def test_shards_of_a_server(shards, server, tmp_path):
    data = WebDataset(f"{server.address}/{{00..09}}.tar", size=16, shuffle_shards=2, keep_shards=4)
    assert len(data) == 30
    assert server.asked == {f"{k:02d}.tar": 1 for k in range(10)}
    kept = list((tmp_path / "cache/dic-repa/shards").rglob("*.tar"))
    assert sorted(file.name for file in kept) == ["06.tar", "07.tar", "08.tar", "09.tar"]
    local = WebDataset(shards, size=16)
    torch.testing.assert_close(data[13], local[13])
    assert server.asked["04.tar"] == 2  # it had made room meanwhile
    torch.testing.assert_close(pickle.loads(pickle.dumps(data))[29], local[29])
    server.asked.clear()
    again = WebDataset(f"{server.address}/{{00..09}}.tar", size=16, shuffle_shards=2, keep_shards=4)
    assert (len(again), again.num_classes, server.asked) == (30, 30, {})  # the counts are kept


def test_a_server_with_an_index_is_asked_for_the_first_shard_only(tmp_path):
    folder = write_set(tmp_path / "set", 2, 3)
    write_index(folder, [2, 3])
    with serve(folder) as server:
        with pytest.raises(UserError, match=r"names no classes; set data.options.num_classes"):
            WebDataset(server.address, size=16)
        data = WebDataset(f"{server.address}/", size=16, num_classes=4)
        assert (len(data), data.class_names, server.asked["01.tar"]) == (5, ("0", "1", "2", "3"), 0)
        with pytest.raises(UserError, match=r"sample 2 in .*/01.tar is of class 4, and there are 4, numbered from 0"):
            data[4]
        write_index(folder, [2, 4])
        with pytest.raises(UserError, match=r"/01.tar is not as it should be: .* holds 3 samples instead of 4"):
            WebDataset(server.address, size=16, num_classes=5)[5]


def test_a_server_that_fails_is_asked_again(server, monkeypatch):
    place = f"{server.address}/{{00..01}}.tar"
    server.faults = {"00.tar": [503, "cut", "silent"], "01.tar": ["cut"] * 4}
    with pytest.raises(UserError, match=r"/01.tar cannot be read \(its answer ended after 5,120 of 10,240 bytes, in 4"):
        WebDataset(place, size=16)
    server.faults["01.tar"] = ["silent"] * 4
    with pytest.raises(UserError, match=r"/01.tar cannot be read \(.*in 4 tries\); when the server is back, run"):
        WebDataset(place, size=16)
    assert len(WebDataset(place, size=16)) == 5
    assert server.asked["00.tar"] == 1


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("{00..10}.tar", r"/10.tar cannot be had \(it answers 404 Not Found\); correct the address"),
        ("", r" has no index.json, without which its shards are not known; name them, as in http"),
        ("none.json", r"there is no index http.*/none.json"),
    ],
)
def test_addresses_that_are_wrong(server, path, told):
    with pytest.raises(UserError, match=told):
        WebDataset(f"{server.address}/{path}", size=16, keep_shards=20)


def test_a_server_that_goes_away_ends_a_run_with_its_steps_saved(shards, tmp_path):
    with serve(shards) as server:
        write = [f"data.path={server.address}/{{00..09}}.tar", "data.options={shuffle_shards: 1, keep_shards: 1}"]
        server.faults = {"05.tar": [None, *[500] * 99]}  # it is there while the shards are counted
        with pytest.raises(UserError, match=r"/05.tar cannot be read \(it answers 500 .*, in 4 tries\)"):
            small_run(tmp_path / "run", "data.name=webdataset", *write, "train.steps=30", "train.batch_size=1")
    saved = re.search(r"step_(\d+)", str(sorted((tmp_path / "run/checkpoints").iterdir())[-1]))
    assert int(saved[1]) > 0


@pytest.mark.parametrize("where", ["header", "content", "end mark"])
def test_a_tar_cut_short_is_named_before_training(tmp_path, where):
    folder = write_set(tmp_path / "set", 3, 3)
    with tarfile.open(folder / "01.tar") as archive:
        last = archive.getmembers()[-1]
    length = {"header": last.offset + 100, "content": last.offset_data + 1, "end mark": last.offset_data + 512}[where]
    content = (folder / "01.tar").read_bytes()
    (folder / "01.tar").write_bytes(content[:length])
    with pytest.raises(UserError, match=r"/01.tar (is neither .* whole|ends without|cannot be read on).*copy or|whole"):
        WebDataset(folder, size=16)


def test_a_tar_cut_short_while_it_is_read(tmp_path):
    folder = write_set(tmp_path / "set", 3)
    data = WebDataset(folder, size=16)
    os.truncate(folder / "00.tar", 3000)
    with pytest.raises(UserError, match=r"00.tar has been cut short since it was opened; copy or make it again"):
        data[2]


def without(files: dict, ending: str) -> dict:
    return {key: value for key, value in files.items() if key != ending}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda files: without(files, "png"), r"01.tar: the sample 00003 has no picture, and 00002 has one; the files"),
        (lambda files: without(files, "cls"), r"01.tar: the sample 00003 has no .cls, and 00002 has one"),
        (lambda files: files | {"jpg": b""}, r"01.tar: the sample 00003 has two files as its picture; keep one"),
        (lambda files: files | {"cls": b"cat"}, r"01.tar: 00003.cls is no class number from 0 on, but 'cat'"),
        (lambda files: files | {"cls": b"7"}, r"sample 1 in .*01.tar is of class 7, and there are 5, numbered from 0"),
        (lambda files: files | {"png": b"?"}, r"the picture of sample 1 in .*01.tar is not a whole image"),
    ],
)
def test_samples_that_are_wrong(tmp_path, change, told):
    folder = write_set(tmp_path / "set", 2)
    samples = make_samples(2, first=2)
    write_tar(folder / "01.tar", samples | {"00003": change(samples["00003"])})
    with pytest.raises(UserError, match=told):
        WebDataset(folder, size=16, num_classes=5)[3]


def test_sets_that_are_wrong(tmp_path):
    write_tar(tmp_path / "empty/0.tar", {})
    write_tar(tmp_path / "bare/0.tar", {"x": {"cls": b"0"}})
    write_set(tmp_path / "pixels", 1)
    write_tar(tmp_path / "mixed/0.tar", make_samples(1))
    write_tar(tmp_path / "mixed/1.tar", make_samples(1, labels=False))
    save_vae(tmp_path / "vae")
    write_set(tmp_path / "latents", 1, channels=4)
    (tmp_path / "pixels/index.json").write_text('{"shardlist": [{"url": "../../x.tar", "nsamples": 1}]}')
    vae = {"autoencoder": str(tmp_path / "vae")}
    for path, told, options in [
        ("empty", r"0.tar holds no samples", {}),
        ("bare", r"0.tar: the sample x has neither a picture nor an .npy", {}),
        ("mixed", r"1.tar: its samples have picture, and those of the first shard .cls and picture", {}),
        ("nowhere", r"nowhere is no folder with .tar files; name one, or the shards, as in .*/\{000..127\}.tar", {}),
        ("{0..3}.tar", r"there is no shard .*/0.tar; restore it, or correct data.path", {}),
        ("{3..0}.tar", r"names no shard: its ranges go from the lower number", {}),
        ("{0..3}/../../other.tar", r"leads upwards; write out where the shards are", {}),
        ("{a,b}.tar", r"has braces that are no range such as \{000..127\}", {}),
        ("{0..99999999}.tar", r"the number of shards of .* is 100,000,000, over the limit", {}),
        ("pixels", r"index.json is no index of shards \(its shards are not beside it", {}),
        ("pixels/0{0..0}.tar", r"index.json is no index of shards", {}),
        (
            "latents",
            r"the .npy of sample 0 in .* has the shape \[4, 8, 8\], .*vae with data.size 8 gives \[8,",
            vae,
        ),
        ("latents", r"holds no .flipped.npy, which data.options.flip asks for", vae | {"flip": True}),
        ("latents", r"data.options.shuffle_shards is -1", vae | {"shuffle_shards": -1}),
    ]:
        with pytest.raises(UserError, match=told):
            WebDataset(tmp_path / path, size=8, **options)[0]
    with pytest.raises(UserError, match=r"s3://x/\{0..3\}.tar: shards are read from a disk or by http"):
        WebDataset("s3://x/{0..3}.tar", size=8)


def test_what_would_be_loaded_again_and_again_is_refused(server):
    with pytest.raises(UserError, match=r"keep_shards is 3, and samples are mixed among 10 shards, .* set it to 20"):
        WebDataset(f"{server.address}/{{00..09}}.tar", size=16, keep_shards=3)


def test_a_changed_shard_is_looked_through_again(tmp_path):
    folder = write_set(tmp_path / "set", 3)
    assert len(WebDataset(folder, size=16)) == 3
    write_set(folder, 2)
    assert len(WebDataset(folder, size=16)) == 2
    np.testing.assert_array_equal(WebDataset(folder, size=16)[1]["image"].permute(1, 2, 0), picture(1, (16, 16)))
    for table in (tmp_path / "cache/dic-repa/shard-tables").iterdir():
        table.write_bytes(table.read_bytes()[:-9])
    assert len(WebDataset(folder, size=16)) == 2
