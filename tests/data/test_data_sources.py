"""Every kind of source gives the same images with the same labels; what is wrong with one is said in a line."""

from __future__ import annotations

import json
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from pictures import as_file, picture, write_tree

from dic_repa.data.images import BadImage
from dic_repa.data.sources import open_source
from dic_repa.errors import UserError


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree", {"cat": 2, "dog": 3})


def contents(source):
    return [(np.asarray(source.load(i)).tolist(), source.class_names[source.labels[i]]) for i in range(len(source))]


def zipped(tree, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*.png"), reverse=True):
            archive.write(file, prefix + file.relative_to(tree).as_posix())
        archive.writestr("__MACOSX/._0.png", b"litter")
    return path


def test_folder(tree):
    source = open_source(tree)
    assert source.names == ["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png", "dog/002.png"]
    assert list(source.labels) == [0, 0, 1, 1, 1]
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(np.asarray(source.load(3)), np.asarray(picture(3)))


@pytest.mark.parametrize("prefix", ["", "train/", "imagenet/train/"])
def test_zip_is_the_same(tree, tmp_path, prefix):
    assert contents(open_source(zipped(tree, tmp_path / "a.zip", prefix))) == contents(open_source(tree))


def test_tar_is_the_same(tree, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tree, "train")
    assert contents(open_source(tmp_path / "a.tar")) == contents(open_source(tree))


@pytest.mark.parametrize("kind", ["csv", "dataset.json", "mapping"])
def test_flat_with_labels_is_the_same(tree, tmp_path, kind):
    flat, names = tmp_path / "flat", {}
    flat.mkdir()
    for k, file in enumerate(sorted(tree.rglob("*.png"))):
        (flat / f"{k}.png").write_bytes(file.read_bytes())
        names[f"{k}.png"] = file.parent.name
    if kind == "csv":
        labels = tmp_path / "labels.csv"
        labels.write_text("file,label\n" + "".join(f"{file},{name}\n" for file, name in names.items()))
    elif kind == "mapping":
        labels = tmp_path / "classes.json"
        labels.write_text(json.dumps(names))
    else:
        labels = None
        content = {"labels": [[file, ["cat", "dog"].index(name)] for file, name in names.items()]}
        (flat / "dataset.json").write_text(json.dumps(content))
    source, expected = open_source(flat, labels), contents(open_source(tree))
    if kind == "dataset.json":
        assert source.class_names == ("0", "1")
        expected = [(image, str(["cat", "dog"].index(name))) for image, name in expected]
    assert contents(source) == expected


def test_flat_without_labels_is_one_class(tmp_path):
    flat = write_tree(tmp_path, {"photos": 3}) / "photos"
    zipped(flat, tmp_path / "flat.zip")
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        archive.add(flat, ".")
    source = open_source(flat)
    assert source.names == ["000.png", "001.png", "002.png"]
    assert (list(source.labels), source.class_names) == ([0, 0, 0], ("images",))
    for packed in ("flat.zip", "flat.tar"):
        assert contents(open_source(tmp_path / packed)) == contents(source)
    (flat / "empty").mkdir()
    with pytest.raises(UserError, match="in no class folder, beside folders"):
        open_source(flat)


def test_unlabelled_images_are_of_no_class(tree, tmp_path):
    (tree / "loose.png").write_bytes(as_file(picture(9)))
    source = open_source(tree, unlabelled=True)
    assert (len(source), set(source.labels), source.class_names) == (6, {0}, ())
    (tree / "labels.csv").write_text("loose.png,7\n")
    assert len(open_source(tree, unlabelled=True)) == 6
    with pytest.raises(UserError, match=r"labels\.csv labels them; leave out one"):
        open_source(tree, tree / "labels.csv", unlabelled=True)


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_hugging_face_is_the_same(tree, tmp_path, kind):
    data = datasets.load_dataset("imagefolder", data_dir=str(tree), split="train", cache_dir=str(tmp_path / "cache"))
    if kind == "disk":
        data.save_to_disk(tmp_path / "hf")
    else:
        (tmp_path / "hf").mkdir()
        data.to_parquet(tmp_path / "hf" / "train.parquet")
    assert contents(open_source(tmp_path / "hf")) == contents(open_source(tree))
    source = open_source(tmp_path / "hf", unlabelled=True)
    assert (len(source), set(source.labels), source.class_names) == (5, {0}, ())


def test_fingerprint_sees_names_and_labels(tree, tmp_path):
    before = open_source(tree).fingerprint()
    assert open_source(zipped(tree, tmp_path / "a.zip")).fingerprint() == before
    (tree / "dog" / "002.png").rename(tree / "cat" / "002.png")
    assert open_source(tree).fingerprint() != before


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "cat/../../evil.png", "..\\evil.png"])
def test_names_that_lead_out_are_refused(tree, tmp_path, name):
    with zipfile.ZipFile(zipped(tree, tmp_path / "a.zip"), "a") as archive:
        archive.writestr(name, as_file(picture(0)))
    with pytest.raises(UserError, match="leads out of the archive"):
        open_source(tmp_path / "a.zip")


def test_what_is_wrong_is_said(tree, tmp_path):
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=r"class 1 \(empty\) is without images"):
        open_source(tree)
    (tree / "empty").rmdir()
    (tree / "dog" / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"1 \(dog/notes.txt\) is not named as an image.*--skip-bad"):
        open_source(tree)
    assert open_source(tree, skip_bad=True).rejected == {"dog/notes.txt": "not named as an image"}
    (tree / "dog" / "notes.txt").unlink()
    (tree / "loose.png").write_bytes(as_file(picture(0)))
    with pytest.raises(UserError, match=r"loose.png\) is in no class folder, beside folders; .*--labels.*--unlabelled"):
        open_source(tree)
    (tmp_path / "nothing").mkdir()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tree / "cat", "cat")
    with pytest.raises(UserError, match=r"decompress a \.tar\.gz first"):
        open_source(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match="holds no images"):
        open_source(tmp_path / "nothing")
    with pytest.raises(UserError, match="there is no folder, zip or tar"):
        open_source("./nowhere")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="damaged"):
        open_source(tmp_path / "broken.zip")


def test_labels_that_miss_files(tree, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("cat/000.png,cat\ndog/000.png,dog\n")
    with pytest.raises(UserError, match=r"labels.csv: 3 \(cat/001.png, dog/001.png, dog/002.png\) are not in it"):
        open_source(tree, labels)
    names = [f"cat/00{k}.png" for k in range(2)] + [f"dog/00{k}.png" for k in range(3)]
    labels.with_suffix(".json").write_text(json.dumps(dict.fromkeys(names, -1)))
    with pytest.raises(UserError, match="has the label -1"):
        open_source(tree, labels.with_suffix(".json"))
    labels.write_text("".join(f"{name},-1\n" for name in names))
    with pytest.raises(UserError, match="has the label -1"):
        open_source(tree, labels)
    labels.with_suffix(".json").write_text("[1, 2]")
    with pytest.raises(UserError, match="not a labels file"):
        open_source(tree, labels.with_suffix(".json"))


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"some/pictures cannot be loaded .*--repo-type dataset"):
        open_source("some/pictures")


def test_damaged_member_of_a_zip(tree, tmp_path):
    path = zipped(tree, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    place = content.find(b"IDAT")
    content[place + 10] ^= 255
    path.write_bytes(content)
    with pytest.raises(BadImage, match=r"dog/002\.png"):  # the archive's first member
        open_source(path).load(4)
