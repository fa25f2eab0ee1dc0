"""Hostile or damaged folders, archives and labels: one line each; nothing is dropped, doubled or renamed in silence."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import tarfile
import time
import zipfile

import numpy as np
import pytest
from pictures import as_file, picture, write_tree

from dic_repa.data.sources import open_source
from dic_repa.errors import UserError
from dic_repa.limits import ENVIRONMENT

PNG = [as_file(picture(k)) for k in range(4)]
NAMES = ("cat/0.png", "cat/1.png", "dog/0.png")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return write_tree(tmp_path / "tree", {"cat": 2, "dog": 3})


def write_zip(path, names=NAMES):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in zip(names, PNG):
            archive.writestr(name, data)
    return path


def write_tar(path, names=NAMES, *others: dict):
    """A tar of images, and of members of other types, each as the attributes of its TarInfo."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in zip(names, PNG):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for attributes in others:
            member = tarfile.TarInfo("dog/1.png")
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member)
    return path


def left_out(source):
    """What is left out with skip_bad; without, it is refused with the same words."""
    with pytest.raises(UserError) as error:
        open_source(source)
    opened = open_source(source, skip_bad=True)
    assert all(name in str(error.value) and reason in str(error.value) for name, reason in opened.rejected.items())
    assert "\n" not in str(error.value)
    return opened.rejected, len(opened)


def test_a_folder_reached_twice_is_read_once(tree):
    (tree / "cat/again").symlink_to("..")
    (tree / "dog/cats").symlink_to("../cat")
    assert left_out(tree) == (dict.fromkeys(("cat/again", "dog/cats"), "reached twice, through a link"), 5)


def test_links_that_double_at_each_step_end_soon(tree):
    for k in range(40):
        (tree / f"d{k}").mkdir()
        for name in "ab":
            (tree / f"d{k}" / name).symlink_to(f"../d{k + 1}")
    (tree / "d40").mkdir()
    start = time.monotonic()
    with pytest.raises(UserError, match=r"80 .* reached twice"):
        open_source(tree)
    assert time.monotonic() - start < 2


def test_links_to_folders_and_files_outside_are_followed(tree, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/cow").symlink_to(tree / "cat")
    (tmp_path / "links/pig").mkdir()
    (tmp_path / "links/pig/0.png").symlink_to(tree / "dog/000.png")
    source = open_source(tmp_path / "links")
    assert source.names == ["cow/000.png", "cow/001.png", "pig/0.png"]
    np.testing.assert_array_equal(np.asarray(source.load(2)), np.asarray(picture(2)))


def test_what_is_no_file_is_never_opened(tree, monkeypatch):
    os.mkfifo(tree / "cat/pipe.png")
    (tree / "cat/zero.png").symlink_to("/dev/zero")
    (tree / "cat/lost.png").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as end:
        monkeypatch.chdir(tree)  # since the name of a socket may be short only
        end.bind("dog/socket.png")
    with open(os.fsencode(tree) + b"/dog/\xff.png", "wb") as file:
        file.write(PNG[0])
    rejected, images = left_out(tree)
    assert images == 5
    assert rejected == {
        "cat/pipe.png": "no regular file",
        "cat/zero.png": "no regular file",
        "dog/socket.png": "no regular file",
        "cat/lost.png": "linked to nothing",
        "dog/\\xff.png": "not named in UTF-8",
    }


def test_hidden_images_are_counted(tree):
    (tree / "cat/.kept.png").write_bytes(PNG[0])
    (tree / "cat/._000.png").write_bytes(b"a Mac's")
    assert open_source(tree).left_out() == ["1 (cat/.kept.png) is hidden, and left out"]


def test_a_hard_link_in_a_tar_is_the_file(tmp_path):
    path = write_tar(tmp_path / "a.tar", NAMES, {"type": tarfile.LNKTYPE, "linkname": "cat/1.png"})
    source = open_source(path)
    assert source.names == [*NAMES, "dog/1.png"]
    np.testing.assert_array_equal(np.asarray(source.load(3)), np.asarray(picture(1)))


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ({"type": tarfile.LNKTYPE, "linkname": "cat/9.png"}, "linked to nothing in the archive"),
        ({"type": tarfile.SYMTYPE, "linkname": "../cat/0.png"}, "only a link in the archive"),
        ({"type": tarfile.FIFOTYPE}, "no regular file"),
        ({"type": tarfile.CHRTYPE}, "no regular file"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "no regular file"),
    ],
)
def test_other_members_of_a_tar_are_told(tmp_path, member, reason):
    path = write_tar(tmp_path / "a.tar", NAMES, member)
    assert left_out(path) == ({"dog/1.png": reason}, 3)


def test_names_of_a_tar_that_are_no_utf8_are_told(tmp_path):
    path = write_tar(tmp_path / "a.tar", (*NAMES, "dog/\udcff.png"))
    assert left_out(path) == ({"dog/\\xff.png": "not named in UTF-8"}, 3)


def test_a_link_in_a_zip_is_told(tmp_path):
    link = zipfile.ZipInfo("dog/1.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(write_zip(tmp_path / "a.zip"), "a") as archive:
        archive.writestr(link, "../cat/0.png")
    assert left_out(tmp_path / "a.zip") == ({"dog/1.png": "only a link in the archive"}, 3)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_twice_in_an_archive_are_refused(tmp_path):
    write_zip(tmp_path / "a.zip", ("cat/0.png", "cat/0.png"))
    write_tar(tmp_path / "a.tar", ("cat/0.png", "./cat/0.png"))
    for name in ("a.zip", "a.tar"):
        with pytest.raises(UserError, match=r"several files of the same name \(cat/0\.png\)"):
            open_source(tmp_path / name, skip_bad=True)


@pytest.mark.parametrize("where", ["in a header", "after a member"])
def test_a_tar_that_is_cut_short_is_refused(tmp_path, where):
    path = write_tar(tmp_path / "a.tar")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"dog/0.png") + (200 if where == "in a header" else 0)])
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 2  # Python's own reader says nothing
    with pytest.raises(UserError, match="files would be lost"):
        open_source(path)


def test_a_damaged_header_and_two_tars_in_one_are_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar").read_bytes()
    place = whole.index(b"cat/1.png")
    (tmp_path / "damaged.tar").write_bytes(whole[:place] + b"X" * 300 + whole[place + 300 :])
    (tmp_path / "joined.tar").write_bytes(whole + write_tar(tmp_path / "b.tar", ("cow/0.png",)).read_bytes())
    for name in ("damaged.tar", "joined.tar"):
        with pytest.raises(UserError, match=r"cannot be read on .* files would be lost"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("size", [-1, 2**62])
def test_absurd_sizes_in_a_tar_end(tmp_path, size):
    path = write_tar(tmp_path / "a.tar")
    content, place = bytearray(path.read_bytes()), path.read_bytes().index(b"dog/0.png")
    number = size.to_bytes(12, "big", signed=True)
    content[place + 124 : place + 136] = number if size < 0 else b"\x80" + number[1:]
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    path.write_bytes(content)
    with pytest.raises(UserError, match="is neither a folder, a zip nor a whole uncompressed tar"):
        open_source(path)


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "file-bytes=1M")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(4):
            archive.writestr(f"cat/{k}.bmp", bytes(900_000))
    with pytest.raises(UserError, match=r"unpacked size of .*a\.zip over its own is .* --limit archive-ratio=\d+"):
        open_source(tmp_path / "a.zip")
    monkeypatch.setenv(ENVIRONMENT, "file-bytes=1M archive-ratio=none")
    assert len(open_source(tmp_path / "a.zip")) == 4
    monkeypatch.setenv(ENVIRONMENT, "file-bytes=800k archive-ratio=none")
    with pytest.raises(UserError, match=r"the size of cat/0\.bmp in .* is 900,000, over .* --limit file-bytes=900000"):
        open_source(tmp_path / "a.zip")


def test_a_zip_whose_names_are_no_utf8_is_one_line(tmp_path):
    content = write_zip(tmp_path / "a.zip", ("cat/é.png",)).read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(UserError, match="damaged or no zip"):
        open_source(tmp_path / "a.zip")


def labelled(tmp_path, content, name="labels.json"):
    flat = tmp_path / "flat"
    flat.mkdir(exist_ok=True)
    for k in range(2):
        (flat / f"{k}.png").write_bytes(PNG[k])
    (flat / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return open_source(flat)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "not in it, or without a label"),
        ("", "not in it, or without a label"),
        (True, "has the label true"),
        (1.5, "has the label 1.5"),
        (float("nan"), "has the label NaN"),
        ([1], r"has the label \[1\]"),
        ("\ud800", "no text in UTF-8"),
        (50_000_000, r"50,000,001, over the limit of 1,000,000; .*--limit classes=50000001"),
        (10**20, "--limit classes=none"),
        ("9" * 5000, "a label of thousands of digits"),
    ],
)
def test_labels_that_are_no_class_are_refused(tmp_path, label, said):
    with pytest.raises(UserError, match=rf"^[^\n]*labels\.json[^\n]*{said}"):
        labelled(tmp_path, {"0.png": "1", "1.png": label})


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("0.png,0\n1.png,1\n0.png,1\n", "labels.csv"),
        ('{"0.png": 0, "1.png": 1, "0.png": 1}', "labels.json"),
        ('{"labels": [["0.png", 0], ["1.png", 1], ["0.png", 1]]}', "dataset.json"),
    ],
)
def test_two_labels_of_one_file_are_refused(tmp_path, content, name):
    with pytest.raises(UserError, match=r"1 \(0\.png\) is in it with two labels"):
        labelled(tmp_path, content, name)


def test_the_same_label_twice_and_labels_of_absent_images_are_told(tmp_path):
    source = labelled(tmp_path, "file,label\n0.png,a\n1.png,b\n0.png,a\n7.png,b\n", "labels.csv")
    assert (list(source.labels), source.class_names) == ([0, 1], ("a", "b"))
    assert [line.split(" in ")[0] for line in source.left_out()] == ["1 (7.png) is"]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("[" * 100_000, "labels.json"),
        ('{"labels": [["0.png", 0]], "labels": [["0.png", 1]]}', "labels.json"),
        ('{"labels": null}', "labels.json"),
        ("3", "labels.json"),
        ("0.png\n1.png\n", "labels.csv"),
        (f"0.png,{'x' * 200_000}\n1.png,1\n", "labels.csv"),
    ],
)
def test_what_is_no_labels_file_is_one_line(tmp_path, content, name):
    with pytest.raises(UserError, match=r"^[^\n]*is not a labels file[^\n]*$"):
        labelled(tmp_path, content, name)


def test_two_labels_files_are_refused(tmp_path):
    labelled(tmp_path, {"0.png": 0, "1.png": 1})
    with pytest.raises(UserError, match=r"has dataset\.json and labels\.json; name the right one"):
        labelled(tmp_path, {"0.png": 1, "1.png": 0}, "dataset.json")


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_a_labels_file_that_is_none_is_not_opened(tree, tmp_path, kind):
    place = tmp_path / "l.csv"
    {"FIFO": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](place)
    with pytest.raises(UserError, match=rf"l\.csv is a {kind}, not a file"):
        open_source(tree, place)
