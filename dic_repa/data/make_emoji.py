"""Make a file of emoji in any size from two packages: for the data set `emoji`, as `data.path`."""

import io
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import click
from PIL import Image, ImageOps

from dic_repa.data.emoji import GROUPS, INDEX, SHEET, columns_of
from dic_repa.data.files import open_tree
from dic_repa.data.images import decode_image
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK, check_file
from dic_repa.files.reading import check_regular, parse_json
from dic_repa.limits import check_limit, limit
from dic_repa.runtime.progress import progress_bar

TABLE = "emoji.json"
PICTURE = re.compile(r"(?:.*/)?assets/([0-9a-f-]+)\.webp")
HINT = "name the two packages of --help"


@click.command()
@click.option("--size", type=click.IntRange(8, 160), default=32, show_default=True, help="Height and width in pixels.")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write.  [default: emoji_SIZE.zip]")
@click.argument("packages", nargs=2, type=click.Path(exists=True, path_type=Path), metavar="PACKAGE PACKAGE")
def main(size: int, out: Path | None, packages: tuple[Path, Path]) -> None:
    """Make a file of Fluent's 3D emoji on white, with their groups, for `data: {name: emoji, path: FILE, size: SIZE}`.

    The PACKAGEs are two archives of npm, or folders into which they were unpacked:

    \b
    npm pack @lobehub/fluent-emoji-3d@1.1.0    # the pictures, MIT licence
    npm pack emoji-datasource@16.0.0           # the groups, MIT licence
    python -m dic_repa.data.make_emoji --size 64 \\
        lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-16.0.0.tgz
    """
    try:
        print(make(packages, size, out or Path(f"emoji_{size}.zip")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def make(packages: tuple[Path, ...], size: int, out: Path) -> str:
    """Write the file `out` of emoji of `size` pixels, and say what is in it.

    Raises:
        UserError: the packages are not the right ones, or damaged; or `out` is a file that is not ours.
    """
    check_file(out)
    pictures: dict[str, bytes] = {}
    for package in packages:
        if not (found := _contents(package)):
            raise UserError(f"{package} has neither assets/*.webp nor {TABLE}; {HINT}")
        pictures |= found
    if TABLE not in pictures:
        raise UserError(f"there is no {TABLE}, the table of groups, in {' or '.join(map(str, packages))}; {HINT}")
    group_of = _groups(pictures.pop(TABLE))
    names = sorted(pictures.keys() & group_of.keys())
    if not names:
        raise UserError(f"there are no pictures with a group in {' and '.join(map(str, packages))}; {HINT}")
    sheet = Image.new("RGB", (columns_of(len(names)) * size, -(-len(names) // columns_of(len(names))) * size), "white")
    for place, name in enumerate(progress_bar(names, desc="emoji", unit="picture")):
        row, column = divmod(place, columns_of(len(names)))
        picture = decode_image(pictures[name], f"{name}.webp")  # on white
        picture = ImageOps.pad(picture, (max(picture.size),) * 2, color="white")  # a few are not square
        sheet.paste(picture.resize((size, size), Image.Resampling.LANCZOS), (column * size, row * size))
    groups = {group: [name for name in names if group_of[name] == group] for group in GROUPS}
    _write(out, {"size": size, "groups": groups}, sheet)
    size_in_mb, left = out.stat().st_size / 1e6, len(pictures) - len(names)
    return f"{out}: {len(names):,} emoji of {size} px, {size_in_mb:.1f} MB; {left} without a group are left out"


def _contents(package: Path) -> dict[str, bytes]:
    """The pictures of a package by their names, and its table of groups; nothing is unpacked to disk."""
    if package.is_dir():
        tree = open_tree(package)
        return {name: tree.read(path) for path in tree.names if (name := _name(path))}
    found, unpacked = {}, 0
    try:
        check_regular(package, "file-bytes")
        with tarfile.open(package, "r:gz") as archive:
            for member in archive:
                unpacked += member.size
                if unpacked > limit("file-bytes"):
                    ratio = unpacked // package.stat().st_size
                    check_limit("archive-ratio", ratio, f"the unpacked size of {package} over its own")
                if (name := _name(member.name)) and (file := archive.extractfile(member)):
                    found[name] = file.read()
    except UserError:
        raise
    except Exception as error:  # gzip, zlib and tar raise anything from EOFError to OverflowError
        raise UserError(f"{package} is no whole .tgz ({first_line(error)}); get it again as --help says") from None
    return found


def _name(path: str) -> str:
    """What a file of a package is to us: a picture's code points, or the table; "" for any other."""
    if match := PICTURE.fullmatch(path):
        return match[1]
    return TABLE if path.rpartition("/")[2] == TABLE else ""


def _groups(table: bytes) -> dict[str, str]:
    """The group of each emoji and of its skin tones, by all names that the table has for it."""
    found: dict[str, str] = {}
    try:
        for entry in parse_json(table):
            if entry["category"] in GROUPS:
                for each in (entry, *entry.get("skin_variations", {}).values()):
                    found |= {each[key].lower(): entry["category"] for key in ("unified", "non_qualified") if each[key]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{TABLE} is not emoji-datasource's ({first_line(error)}); {HINT}") from None
    return found


def _write(out: Path, index: dict, sheet: Image.Image) -> None:
    """The zip, which has no times in it: the same pictures give the same file."""
    picture = io.BytesIO()
    sheet.save(picture, "webp", lossless=True, quality=75, method=4)
    with write_aside(out) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = MARK.encode()
        archive.writestr(zipfile.ZipInfo(INDEX), json.dumps(index), zipfile.ZIP_DEFLATED)
        archive.writestr(zipfile.ZipInfo(SHEET), picture.getvalue(), zipfile.ZIP_STORED)


if __name__ == "__main__":
    main()
