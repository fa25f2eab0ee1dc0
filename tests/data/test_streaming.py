"""Hugging Face data sets as streams: exact and resumable, the same for any number of processes."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from pictures import as_file, picture
from small_runs import small_recipe, small_run

from dic_repa.data import Stream
from dic_repa.errors import UserError
from dic_repa.recipe.build import build_dataset
from dic_repa.training.inputs import Batches, order_of

COUNTS = (9, 4, 7)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s at an epoch's end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures in three parquet files; each is of its own class, and the files do not say how many they hold."""
    place = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=20)})
    for k in range(3):
        numbers = range(sum(COUNTS[:k]), sum(COUNTS[: k + 1]))
        images = [{"bytes": as_file(picture(n, (16, 16))), "path": None} for n in numbers]
        table = datasets.Dataset.from_dict({"image": images, "label": list(numbers)}, features=features)
        table.to_parquet(place / f"train-{k:05d}-of-00003.parquet")
    return place


def read(folder, steps: int, start: int = 0, process: int = 0, processes: int = 1, workers: int = 0):
    """The labels of each batch."""
    keys = ["data.name=stream", f"data.path={folder}", "data.options={buffer: 5}", f"data.workers={workers}"]
    recipe = small_recipe(*keys, "train.batch_size=6")
    accelerator = SimpleNamespace(process_index=process, num_processes=processes, device=torch.device("cpu"))
    batches = Batches(build_dataset(recipe.data), recipe, accelerator, start)
    found = [batch["label"].tolist() for batch in itertools.islice(batches, steps)]
    batches.close()
    return found


def test_each_epoch_has_every_sample_once_and_is_exact(folder, capsys):
    whole = read(folder, 10)
    stream = list(itertools.chain(*whole))
    epochs = [stream[k : k + 20] for k in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    capsys.readouterr()
    assert read(folder, 5, start=5, workers=2) == whole[5:]
    assert [a + b for a, b in zip(read(folder, 4, 0, 0, 2), read(folder, 4, 0, 1, 2))] == whole[:4]


def test_a_resumed_run_says_what_it_reads_again(folder, capsys):
    read(folder, 1, start=5)
    err = capsys.readouterr().err
    assert f"{folder} has 20 samples; data.options.samples=20 spares counting them" in err
    assert f"note: {folder} is read over the first 10 samples of epoch 2, up to where it was" in err


def test_a_run_of_a_stream(folder, tmp_path):
    keys = ["data.name=stream", f"data.path={folder}", "data.options={samples: 20}", "train.steps=2"]
    run = small_run(tmp_path / "run", *keys, "train.checkpoint_every=2")
    assert json.loads(run.metrics_file.read_text().splitlines()[-1])["step"] == 2
    data = Stream(folder, size=8, samples=20, unlabelled=True)
    assert (len(data), data.num_classes, data[0]["image"].shape) == (20, 0, (3, 8, 8))
    assert next(order_of(data, small_recipe("train.batch_size=3").train, 4)) == [12, 13, 14]


def test_streams_that_are_wrong(folder, tmp_path):
    with pytest.raises(UserError, match=r"has 20 samples, and not 12, by which .* set data.options.samples=20 for"):
        list(itertools.islice(Stream(folder, size=16, samples=12).stream(0, 0), 21))
    with pytest.raises(UserError, match=r"is a stream, whose samples cannot be taken by their number"):
        Stream(folder, size=16, samples=20)[1]
    with pytest.raises(UserError, match=r"data.options.buffer and data.options.samples are at least 1"):
        Stream(folder, size=16, buffer=0)
    with pytest.raises(UserError, match=r"the data set .*nothing cannot be streamed"):
        Stream(str(tmp_path / "nothing"), size=16)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in folder.iterdir():
        content = bytearray(file.read_bytes())
        if "00001" in file.name:
            content[200:600] = bytes(400)
        (cut / file.name).write_bytes(content)
    data = Stream(str(cut), size=16, samples=20)
    with pytest.raises(UserError, match=r"cannot be read on|is not a whole image"):
        [data.decode(row) for row in itertools.islice(data.stream(0, 0), 20)]
