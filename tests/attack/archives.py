"""Hostile archives, folders, images and labels, prepared and trained on.

Each case says how many images a right reading gives, or that the input must be refused; what is neither named nor
counted as left out, and missing all the same, was altered in silence.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from .judge import CONTROL, Case

COUNT = 156
REFUSE = -1  # of images: not to be taken at all
ANY = -2  # refused, or all six images


def picture(index: int = 0, size: int = 16) -> bytes:
    """A small PNG file, another one for each index."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (size, size), (20 * index % 255, 90, 160)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few KB that says it has `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
        + chunk(b"IEND", b"")
    )


SIX = {f"{name}/{i}.png": picture(i) for i, name in enumerate("aabbcc")}
FLAT = {f"{i}.png": picture(i) for i in range(6)}


def zipped(files: dict[str, bytes], folder: Path, twice: dict[str, bytes] | None = None) -> Path:
    """A zip of the files; `twice` are added after them."""
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")
        for name, data in [*files.items(), *(twice or {}).items()]:
            archive.writestr(name, data)
    return folder / "data.zip"


def tarred(
    files: dict[str, bytes], folder: Path, *more: tarfile.TarInfo, twice: dict[str, bytes] | None = None
) -> Path:
    """An uncompressed tar of the files, then of members without content."""
    with tarfile.open(folder / "data.tar", "w") as archive:
        for name, data in [*files.items(), *(twice or {}).items()]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in more:
            archive.addfile(member)
    return folder / "data.tar"


def foldered(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(data)
    return folder / "data"


def member(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, target, size
    return found


def edited(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flipped(data: bytearray, place: int) -> bytearray:
    data[place] ^= 4
    return data


def with_link(folder: Path, name: str, target: str) -> None:
    place = foldered(SIX, folder) / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def labelled(text: bytes | str, kind: str, folder: Path) -> None:
    foldered(FLAT, folder)
    (folder / f"labels.{kind}").write_bytes(text.encode() if isinstance(text, str) else text)


def rows(*labels: object, more: str = "") -> str:
    return "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels)) + more


def pairs(*labels: object) -> str:
    return json.dumps({"labels": [[f"{i}.png", label] for i, label in enumerate(labels)]})


def big_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in SIX.items():
            archive.writestr(name, data)
        with archive.open("a/bomb.png", "w", force_zip64=True) as file:
            for _ in range(1500):
                file.write(bytes(1 << 20))


def fifo(folder: Path) -> None:
    os.mkfifo(foldered(SIX, folder) / "a/pipe.png")


def sparse(folder: Path) -> None:
    os.truncate(foldered(SIX | {"a/big.png": b""}, folder) / "a/big.png", 10**11)


def bad_name(folder: Path) -> None:
    data = foldered(SIX, folder)
    (data / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(7))


def lying_zip(folder: Path) -> None:
    """The first member's size in the directory is a lie."""
    path = zipped(SIX, folder)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 2**31)
    path.write_bytes(data)


# name: what to place, the images that a right reading gives, and options of `prepare`.
Place = Callable[[Path], object]
CASES: dict[str, tuple[Place, int, str]] = {
    "zip": (partial(zipped, SIX), 6, ""),
    "tar": (partial(tarred, SIX), 6, ""),
    "folder": (partial(foldered, SIX), 6, ""),
    "zip, a name twice": (lambda f: zipped(SIX, f, {"a/0.png": picture(9)}), REFUSE, ""),
    "zip, a name twice, alike": (lambda f: zipped(SIX, f, {"a/0.png": picture(0)}), ANY, ""),
    "zip, a name in capitals too": (lambda f: zipped(SIX, f, {"a/0.PNG": picture(9)}), 7, ""),
    "zip, up": (lambda f: zipped(SIX, f, {"../x.png": picture(9)}), REFUSE, ""),
    "zip, absolute": (lambda f: zipped(SIX, f, {"/tmp/x.png": picture(9)}), REFUSE, ""),
    "zip, backslash": (lambda f: zipped(SIX, f, {"a\\x.png": picture(9)}), ANY, ""),
    "zip, control": (lambda f: zipped(SIX, f, {f"a/{CONTROL}.png": picture(9)}), 7, ""),
    "zip, control, no image": (lambda f: zipped(SIX, f, {f"a/{CONTROL}.png": b"x"}), REFUSE, ""),
    "zip, bomb": (big_zip, REFUSE, ""),
    "zip, size is a lie": (lying_zip, REFUSE, ""),
    "zip, cut": (lambda f: edited(zipped(SIX, f), lambda d: d[:-40]), REFUSE, ""),
    "zip, halved": (lambda f: edited(zipped(SIX, f), lambda d: d[: len(d) // 2]), REFUSE, ""),
    "zip, a bit": (lambda f: edited(zipped(SIX, f), lambda d: flipped(d, 60)), REFUSE, ""),
    "zip, empty": (lambda f: zipped({}, f), REFUSE, ""),
    "zip, nothing": (lambda f: (f / "data.zip").touch(), REFUSE, ""),
    "zip, noise": (lambda f: (f / "data.zip").write_bytes(Random(1).randbytes(5000)), REFUSE, ""),
    "zip, a zip inside": (lambda f: zipped(SIX | {"a/x.zip": zipped(SIX, f).read_bytes()}, f), REFUSE, ""),
    "zip, many names": (lambda f: zipped({f"a/{i}/" * 40: b"" for i in range(2000)}, f), REFUSE, ""),
    "tar, a name twice": (lambda f: tarred(SIX, f, twice={"a/0.png": picture(9)}), REFUSE, ""),
    "tar, a name twice by a dot": (lambda f: tarred(SIX, f, twice={"./a/0.png": picture(9)}), REFUSE, ""),
    "tar, hard link": (lambda f: tarred(SIX, f, member("a/9.png", tarfile.LNKTYPE, "a/0.png")), 7, ""),
    "tar, hard link to nothing": (lambda f: tarred(SIX, f, member("a/9.png", tarfile.LNKTYPE, "no.png")), REFUSE, ""),
    "tar, link": (lambda f: tarred(SIX, f, member("a/9.png", tarfile.SYMTYPE, "0.png")), ANY, ""),
    "tar, link out": (lambda f: tarred(SIX, f, member("a/9.png", tarfile.SYMTYPE, "../../../x.png")), REFUSE, ""),
    "tar, link to itself": (lambda f: tarred(SIX, f, member("a/9.png", tarfile.SYMTYPE, "9.png")), REFUSE, ""),
    "tar, fifo": (lambda f: tarred(SIX, f, member("a/9.png", tarfile.FIFOTYPE)), REFUSE, ""),
    "tar, device": (lambda f: tarred(SIX, f, member("a/9.png", tarfile.CHRTYPE)), REFUSE, ""),
    "tar, up": (lambda f: tarred(SIX | {"../x.png": picture(9)}, f), REFUSE, ""),
    "tar, absolute": (lambda f: tarred(SIX | {"/x.png": picture(9)}, f), REFUSE, ""),
    "tar, control": (lambda f: tarred(SIX | {f"a/{CONTROL}.png": b"x"}, f), REFUSE, ""),
    "tar, not UTF-8": (lambda f: tarred(SIX | {"a/caf\udce9.png": picture(9)}, f), REFUSE, ""),
    "tar, cut": (lambda f: edited(tarred(SIX, f), lambda d: d[:1000]), REFUSE, ""),
    "tar, header damaged": (lambda f: edited(tarred(SIX, f), lambda d: flipped(d, 1024 + 10)), REFUSE, ""),
    "tar, a header in the middle zeroed": (
        lambda f: edited(tarred(SIX, f), lambda d: d[:2048] + bytes(512) + d[2560:]),
        REFUSE,
        "",
    ),
    "tar, two joined": (lambda f: edited(tarred(SIX, f), lambda d: d + d), ANY, ""),
    "tar, packed": (lambda f: tarfile.open(f / "data.tar", "w:gz").close(), REFUSE, ""),
    "tar, nothing": (lambda f: (f / "data.tar").touch(), REFUSE, ""),
    "folder, link to a parent": (lambda f: with_link(f, "a/up", ".."), ANY, ""),
    "folder, link to itself": (lambda f: with_link(f, "a/me.png", "me.png"), REFUSE, ""),
    "folder, link of a class": (lambda f: with_link(f, "d", "a"), REFUSE, ""),
    "folder, link to nowhere": (lambda f: with_link(f, "a/x.png", "nowhere"), REFUSE, ""),
    "folder, endless device": (lambda f: with_link(f, "a/x.png", "/dev/zero"), REFUSE, ""),
    "folder, endless device, skipped": (lambda f: with_link(f, "a/x.png", "/dev/zero"), ANY, "--skip-bad"),
    "folder, fifo": (fifo, REFUSE, ""),
    "folder, fifo, skipped": (fifo, ANY, "--skip-bad"),
    "folder, a file of 100 GB": (sparse, REFUSE, ""),
    "folder, name not UTF-8": (bad_name, REFUSE, ""),
    "folder, empty class": (lambda f: (foldered(SIX, f) / "d").mkdir(), REFUSE, ""),
    "folder, loose image": (lambda f: foldered(SIX | {"x.png": picture(9)}, f), REFUSE, ""),
    "folder, text": (lambda f: foldered(SIX | {"a/x.txt": b"x"}, f), REFUSE, ""),
    "folder, text, skipped": (lambda f: foldered(SIX | {"a/x.txt": b"x"}, f), ANY, "--skip-bad"),
    "image, empty": (lambda f: foldered(SIX | {"a/x.png": b""}, f), REFUSE, ""),
    "image, cut": (lambda f: foldered(SIX | {"a/x.png": picture(9, 64)[:-30]}, f), REFUSE, ""),
    "image, cut, skipped": (lambda f: foldered(SIX | {"a/x.png": picture(9, 64)[:-30]}, f), ANY, "--skip-bad"),
    "image, noise": (lambda f: foldered(SIX | {"a/x.png": Random(2).randbytes(3000)}, f), REFUSE, ""),
    "image, bomb": (lambda f: foldered(SIX | {"a/x.png": bomb(30_000)}, f), REFUSE, ""),
    "image, larger bomb": (lambda f: foldered(SIX | {"a/x.png": bomb(2**31 - 1)}, f), REFUSE, ""),
    "image, bomb, skipped": (lambda f: foldered(SIX | {"a/x.png": bomb(30_000)}, f), ANY, "--skip-bad"),
    "image, a script": (
        lambda f: foldered(SIX | {"a/x.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, f),
        REFUSE,
        "",
    ),
    "image, markup": (
        lambda f: foldered(SIX | {"a/x.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, f),
        REFUSE,
        "",
    ),
    "no images": (lambda f: (f / "data").mkdir(), REFUSE, ""),
}
LABELS: dict[str, tuple[Place, int]] = {
    "csv": (partial(labelled, rows(0, 0, 1, 1, 2, 2), "csv"), 6),
    "csv, huge label": (partial(labelled, rows(0, 1, 2, 3, 4, 50_000_000), "csv"), REFUSE),
    "csv, 10^20": (partial(labelled, rows(0, 1, 2, 3, 4, 10**20), "csv"), REFUSE),
    "csv, 5,000 digits": (partial(labelled, rows(0, 1, 2, 3, 4, "9" * 5000), "csv"), REFUSE),
    "csv, negative": (partial(labelled, rows(0, 1, 2, 3, 4, -1), "csv"), REFUSE),
    "csv, empty label": (partial(labelled, rows("a", "a", "b", "b", "c", ""), "csv"), REFUSE),
    "csv, contradiction": (partial(labelled, rows(0, 0, 1, 1, 2, 2, more="0.png,2\n"), "csv"), REFUSE),
    "csv, the same row twice": (partial(labelled, rows(0, 0, 1, 1, 2, 2, more="0.png,0\n"), "csv"), ANY),
    "csv, a row of no image": (partial(labelled, rows(0, 0, 1, 1, 2, 2, more="77.png,2\n"), "csv"), ANY),
    "csv, a row is missing": (partial(labelled, rows(0, 0, 1, 1, 2), "csv"), REFUSE),
    "csv, one column": (partial(labelled, "0.png\n1.png\n2.png\n3.png\n4.png\n5.png\n", "csv"), REFUSE),
    "csv, not UTF-8": (partial(labelled, rows(*"aabbcé").encode("latin-1"), "csv"), REFUSE),
    "csv, UTF-16": (partial(labelled, rows(0, 0, 1, 1, 2, 2).encode("utf-16"), "csv"), REFUSE),
    "csv, NUL": (partial(labelled, rows(0, 0, 1, 1, 2, "2\0"), "csv"), REFUSE),
    "csv, long field": (partial(labelled, rows(0, 0, 1, 1, 2, "x" * 200_000), "csv"), REFUSE),
    "csv, control": (partial(labelled, rows(*"aabbc", CONTROL), "csv"), ANY),
    "csv, a bracket left open": (partial(labelled, rows(0, 0, 1, 1, 2, '"2'), "csv"), ANY),
    "csv, empty": (partial(labelled, "", "csv"), REFUSE),
    "json": (partial(labelled, pairs(0, 0, 1, 1, 2, 2), "json"), 6),
    "json, null": (partial(labelled, pairs(0, 0, 1, 1, 2, None), "json"), REFUSE),
    "json, all null": (partial(labelled, '{"labels": null}', "json"), REFUSE),
    "json, true": (partial(labelled, pairs(0, 0, 1, 1, 2, True), "json"), REFUSE),
    "json, 1.5": (partial(labelled, pairs(0, 0, 1, 1, 2, 1.5), "json"), REFUSE),
    "json, NaN": (partial(labelled, pairs(0, 0, 1, 1, 2, float("nan")), "json"), REFUSE),
    "json, list": (partial(labelled, pairs(0, 0, 1, 1, 2, [1]), "json"), REFUSE),
    "json, huge": (partial(labelled, pairs(0, 0, 1, 1, 2, 50_000_000), "json"), REFUSE),
    "json, negative": (partial(labelled, pairs(0, 0, 1, 1, 2, -3), "json"), REFUSE),
    "json, contradiction": (
        partial(labelled, pairs(0, 0, 1, 1, 2, 2).replace("]]}", '], ["0.png", 2]]}'), "json"),
        REFUSE,
    ),
    "json, a key twice": (
        partial(
            labelled,
            "{" + ", ".join(f'"{i}.png": 0' for i in [*range(6), 0]).replace('0.png": 0}', "") + ', "1.png": 1}',
            "json",
        ),
        REFUSE,
    ),
    "json, a number": (partial(labelled, "3", "json"), REFUSE),
    "json, deep": (partial(labelled, "[" * 100_000, "json"), REFUSE),
    "json, cut": (partial(labelled, pairs(0, 0, 1, 1, 2, 2)[:-9], "json"), REFUSE),
    "json, noise": (partial(labelled, Random(3).randbytes(500), "json"), REFUSE),
    "json, string pairs": (partial(labelled, '["ab", "cd"]', "json"), REFUSE),
}
NAMES = [*CASES, *(f"labels: {name}" for name in LABELS)]


def case(index: int, chance: Random) -> Case:
    """Each of `NAMES` by `prepare`; then, as far as `COUNT` goes, by a run that trains on the images as they are."""
    name = NAMES[index % len(NAMES)]
    if name.startswith("labels: "):
        place, images = LABELS[name.removeprefix("labels: ")]
        kind = "json" if "json" in name else "csv"
        source, options, keys = "data", f"--labels labels.{kind}", [f"data.options.labels=labels.{kind}"]
    else:
        place, images, options = CASES[name]
        source = f"data.{name[:3]}" if name[:3] in ("zip", "tar") else "data"
        keys = ["data.options.skip_bad=true"] * bool(options)
    if index < len(NAMES):
        line = f"prepare {source} out --size 16 --autoencoder none --batch-size 4 --workers 2 {options}"
        check = partial(wrong_count, images)
    else:
        keys = ["data.name=images", f"data.path={source}", "data.size=16", "train.steps=4", *keys]
        line, check = "train tiny.yaml --out out " + " ".join(f"--set {key}" for key in keys), lambda folder: ""
    # A damaged image is met when it is drawn, which these few steps need not do.
    must = "refuse" if images == REFUSE and (index < len(NAMES) or "image, " not in name) else "answer"
    return Case(
        f"{name}: {line.split()[0]}",
        [line.split()],
        partial(placed, place),
        must="work" if images > 0 else must,
        check=check,
    )


def placed(place: Place, folder: Path) -> None:
    from .good import TINY

    (folder / "tiny.yaml").write_text(TINY)
    place(folder)


def wrong_count(images: int, folder: Path) -> str:
    """What is wrong with the number of prepared images, where nothing was said of those left out."""
    report = json.loads((folder / "out/check.json").read_text())
    said = "".join((folder.parent / name).read_text(errors="replace") for name in ("said", "errors"))
    told = any(word in said for word in ("skipped", "warning", "note", "left out"))
    if images > 0 and report["images"] != images:
        return f"{report['images']} images, not {images}"
    return (
        f"{report['images']} images, and not a word of the others"
        if report["images"] != 6 and not told and images < 0
        else ""
    )
