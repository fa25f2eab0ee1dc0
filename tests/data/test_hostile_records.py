"""What `prepare` wrote, damaged; images, .npz and .npy files that claim too much: one line each, before any memory."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from pictures import as_file, picture, write_tree
from PIL import Image

from dic_repa.data.autoencoders import load_autoencoder, load_spec
from dic_repa.data.images import BadImage, center_crop, decode_image
from dic_repa.data.prepare import Preparation
from dic_repa.data.prepared import Prepared
from dic_repa.data.saved import SavedData
from dic_repa.data.sources import open_source
from dic_repa.errors import UserError
from dic_repa.evaluation.image_sets import open_images
from dic_repa.evaluation.reference import _stored
from dic_repa.files.npz import NpzFile, read_array
from dic_repa.limits import ENVIRONMENT


@pytest.fixture
def preparation(tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    write_tree(tmp_path / "tree", {"cat": 2, "dog": 3})
    made = Preparation(open_source(tmp_path / "tree"), tmp_path / "out", load_autoencoder("none"), 16, shard_size=2)
    made.begin()
    made.write_shards()
    made.finish()
    return made


def change(file, key, value):
    """Set a dotted key of a JSON record, or remove it where `value` is ..."""
    content = json.loads(file.read_text())
    *parents, last = key.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    file.write_text(json.dumps(content))


DAMAGES = [b"", b"[]", b"null", b"3", b"hello", b'{"a": "\xff"}', b"\0" * 99, b'{"size": 1', b"[" * 10**5]


def test_a_damaged_prepare_json_is_one_line(preparation):
    file = preparation.destination / "prepare.json"
    whole = file.read_bytes()
    assert len(Prepared(preparation.destination)) == 5
    for content in [*DAMAGES, b'{"size": ' + b"9" * 5000 + b"}"]:
        file.write_bytes(content)
        for read in (preparation.begin, lambda: Prepared(preparation.destination)):
            with pytest.raises(UserError, match=r"^[^\n]*prepare\.json is damaged \([^\n]*\); restore it"):
                read()
    keys = ("source", "size", "flip", "class_names", "autoencoder")
    inner = ("channels", "downsample", "shift", "scale")
    for key in (*keys, *(f"autoencoder.{name}" for name in inner)):
        for value in (..., None, "x", [], -1, 10**20, [float("nan")] * 3):
            file.write_bytes(whole)
            change(file, key, value)
            for read in (preparation.begin, lambda: Prepared(preparation.destination)):
                if (key, value) != ("class_names", []):
                    with pytest.raises(UserError, match=r"^[^\n]*prepare\.json[^\n]*$|begun with another"):
                        read()


def test_a_damaged_list_of_shards_is_one_line(preparation):
    file = preparation.destination / "state.json"
    names = ["/etc/passwd", "../tree/cat/000.png", 3, None, ".", "data-00000-of-00003.arrow"]
    lists = [{"_data_files": [{"filename": name}] * 2} for name in names]
    for content in [*DAMAGES, *(json.dumps(each).encode() for each in [{}, {"_data_files": []}, *lists])]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"^[^\n]*state\.json is damaged \([^\n]*\); remove it, and run the same"):
            Prepared(preparation.destination)


def test_a_shard_that_is_cut_or_no_file_is_one_line(preparation):
    data, place = Prepared(preparation.destination), preparation.destination / "data-00000-of-00003.arrow"
    whole = place.read_bytes()
    for end in (0, 1, 8, len(whole) // 2, -1, -8):
        place.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"^[^\n]*data-00000-of-00003\.arrow is missing or damaged[^\n]*$"):
            len(Prepared(preparation.destination))
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match="is a FIFO, not a file"):
        len(Prepared(preparation.destination))
    assert data.files[0] == place.name


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("image", None, "it has no column image"),
        ("label", None, "it has no column label"),
        ("image", ["x", "x"], "is missing or damaged"),
        ("image", [{"bytes": b"junk"}] * 2, "the image of its row 0 cannot be read"),
        ("image", [{"bytes": None}] * 2, "is missing or damaged|the image of its row 0 cannot be read"),
        ("image", [{"bytes": as_file(picture(0, (9, 9)))}] * 2, r"the image of its row 0 is \(3, 9, 9\)"),
        ("label", [2, 2], "the label of its row 0 is 2, of 2 classes"),
        ("label", [-1, -1], "the label of its row 0 is -1, of 2 classes"),
        ("label", ["x", "x"], "is missing or damaged"),
    ],
)
def test_columns_that_do_not_fit_are_one_line(preparation, column, values, said):
    file = preparation.destination / "data-00000-of-00003.arrow"
    table = pa.ipc.open_stream(file.read_bytes()).read_all().drop_columns(["crc32"])  # as a forger would
    table = table.drop_columns([column])
    if values:
        table = table.append_column(column, pa.array(values))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=rf"^[^\n]*data-00000-of-00003\.arrow[^\n]*({said})[^\n]*$"):
        Prepared(preparation.destination)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"latent_channels": 10**9},
        {"latent_channels": "x"},
        {"block_out_channels": [10**6, 8]},
        {"block_out_channels": [8] * 10**5},
        {"block_out_channels": None},
        {"layers_per_block": 10**9},
        {"scaling_factor": float("nan")},
        {"latents_mean": [0.0], "latents_std": [0]},
    ],
)
def test_an_absurd_autoencoder_is_one_line_before_it_is_built(tmp_path, change):
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8], "norm_num_groups": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_spec(str(tmp_path)).channels == 4
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    for read in (load_spec, load_autoencoder):
        with pytest.raises(UserError, match=r"^[^\n]*holds no autoencoder: it takes[^\n]*$"):
            read(str(tmp_path))


@pytest.mark.parametrize("content", [b"[]", b"null", b'{"autoencoder": 3, "class_names": []}', b"[" * 10**5])
def test_a_damaged_data_json_is_one_line(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.json is damaged; remove it"):
        SavedData.read(tmp_path)


def test_pixels_are_bounded_before_they_are_decoded(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "image-pixels=5000")
    with pytest.raises(BadImage, match=r"the number of pixels of a\.png is 6,000, over .* --limit image-pixels=6000"):
        decode_image(as_file(Image.new("1", (60, 100))), "a.png")
    decode_image(as_file(Image.new("1", (50, 100))), "a.png")
    with pytest.raises(BadImage, match=r"of b\.png, 1x1000, at a short side of 16, is 256,000, over the limit"):
        center_crop(Image.new("L", (1, 1000)), 16, "b.png")


def test_formats_that_start_programs_are_no_images():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadImage, match=r"a\.png is not a whole image \(not an image\)"):
        decode_image(eps, "a.png")


def npy(shape, descr="'|u1'", data=bytes(768), fortran="False"):
    """An .npy file whose header says this shape and kind, whatever the data."""
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


HEADERS = [
    npy("(1000000000000, 8, 8, 3)"),
    npy(f"({10**30}, 8, 8, 3)"),
    npy("(-4, 8, 8, 3)"),
    npy("(True, 8, 32, 3)"),
    npy("(40, 8, 8, 3)"),
    npy("(2, 8, 8, 3)"),
    npy("(4, 8"),
    npy("(" * 500),
    npy("(4, 8, 8, 3)", "'|O'"),
    npy("(4, 4, 4, 3)", "'<U1'"),
    npy("(4, 4, 1, 3)", "'<c16'"),
    npy("(4, 8, 8, 3)", "[('a', '|u1')]"),
    npy("(1000000000000,)", "'|V0'", b""),
]


def test_headers_of_arrays_are_checked_before_memory(tmp_path):
    good = npy("(4, 8, 8, 3)", data=bytes(range(256)) * 3)
    np.testing.assert_array_equal(read_array(io.BytesIO(good), len(good), "x"), np.load(io.BytesIO(good)))
    for content in HEADERS:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            read_array(io.BytesIO(content), len(content), "x")
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
                archive.writestr("arr_0.npy", content)
            for read in (lambda: NpzFile(tmp_path / "a.npz").array("arr_0"), lambda: open_images(tmp_path / "a.npz")):
                with pytest.raises(UserError, match=r"^[^\n]*a\.npz is truncated or no \.npz file[^\n]*$"):
                    read()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_npz_bomb_a_double_array_and_no_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "file-bytes=1M")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", npy("(3000000, 1, 1, 1)", data=bytes(3_000_000)))
    with pytest.raises(UserError, match=r"over the limit of 100; .*--limit archive-ratio="):
        open_images(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "two.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("arr_0.npy", npy("(4, 8, 8, 3)"))
    with pytest.raises(UserError, match="holds an array twice"):
        open_images(tmp_path / "two.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="is a FIFO, not a file"):
        open_images(tmp_path / "pipe.npz")


@pytest.mark.parametrize("descr", ["'|O'", "'<U2'", "'<c8'", "[('a', '<f8')]", "'<M8[s]'"])
def test_statistics_that_are_no_numbers_are_one_line(tmp_path, descr):
    np.savez(tmp_path / "a.npz", sigma=np.eye(8))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("mu.npy", npy("(8,)", descr, bytes(64)))
    with pytest.raises(UserError, match=r"^[^\n]*it holds [^\n]*, not numbers[^\n]*$"):
        _stored(NpzFile(tmp_path / "a.npz"))


def test_statistics_of_nothing_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    with pytest.raises(UserError, match=r"mu and sigma must be \(D,\) and \(D, D\)"):
        _stored(NpzFile(tmp_path / "a.npz"))
