"""A folder of `dic-repa export --format diffusers`, as it is published: with its card completed, without paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCard

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_aside
from dic_repa.files.lock import locked_output
from dic_repa.files.outputs import read_marker
from dic_repa.files.reading import read_json
from dic_repa.publish.card import CARD, TASK
from dic_repa.publish.paths import without_paths

INDEX = "model_index.json"


def is_export(path: object) -> bool:
    """Whether there is a folder that `dic-repa export` wrote."""
    marker = read_marker(path) if isinstance(path, Path) and path.is_dir() else None
    return marker is not None and marker.kind == "export"


def write_exported(source: Path, folder: Path, repository: str, license: str | None, revision: str | None) -> Path:
    """Copy the export `source`, what its marker lists and no more, to `folder`, and return that.

    Raises:
        UserError: it is an export in another format, or not whole.
    """
    marker = read_marker(source)
    names = sorted(marker.names) if marker else []
    if missing := [name for name in (INDEX, CARD) if name not in names]:
        raise UserError(
            f"{source} has no {missing[0]}: of exports, only those of the format diffusers are pushed; upload another "
            f"by `hf upload {repository} {source}`"
        )
    with locked_output(folder), write_aside(folder, "export") as aside:
        for name in names:
            if not (source / name).is_file():
                raise UserError(f"{source} is not whole: {name} is missing; export it again")
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".json"):  # an autoencoder that was copied into the folder had a place
                content = without_paths(read_json(source / name, "export it again"))
                (aside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(source / name, aside / name)
        card = ModelCard.load(aside / CARD)
        card.data.license, card.data.pipeline_tag = license, TASK
        named = f'"{repository}"' + (f', revision="{revision}"' if revision else "")
        card.text = card.text.replace('"FOLDER"', named)
        card.save(aside / CARD)
    return folder
