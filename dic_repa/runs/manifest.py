"""A checkpoint's manifest: the size and SHA-256 of each file, to find damage."""

import json
from pathlib import Path

from dic_repa.files.hashing import file_sha256

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write down all files of `folder`, as they are on the disk."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def find_damage(folder: Path, part: str = "", thorough: bool = True) -> str | None:
    """What is wrong with the checkpoint `folder`, in a few words; None if all is as its manifest says.

    With `part`, only that folder or file in it is checked, such as 'ema'. Unless `thorough`, only sizes are compared,
    which is quick.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if part:
        expected = {name: entry for name, entry in expected.items() if f"{name}/".startswith(f"{part}/")}
    try:
        for name, (size, _) in expected.items():  # sizes first: that is quick, and finds most damage
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
        for name, (_, digest) in expected.items() if thorough else ():
            if file_sha256(folder / name) != digest:
                return f"{name} has another SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None
