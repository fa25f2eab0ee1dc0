"""From a run or a loaded model to a repository of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dic_repa.errors import UserError, first_line
from dic_repa.files.hub import check_repository, check_token, offline_without_network
from dic_repa.files.manifest import MANIFEST
from dic_repa.publish.exported import is_export, write_exported
from dic_repa.publish.folder import FILES, RECIPE, check_target, write_repository
from dic_repa.sampling.load import Checkpoint, load

FOLDERS = Path("hub")  # where repositories are written that are only looked at


def push(
    model: Checkpoint | str | Path,
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    message: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    folder: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    weights: str | None = None,
    device: str = "cpu",
    trust_code: bool = False,
) -> str:
    """Upload a model to the hub, with its recipe, scores, a grid of samples and a card; returns the commit's address.

    Args:
        model: what `load` gives; or the path of a run, a checkpoint, an inference checkpoint, or a diffusers folder of
            `dic-repa export`, which is uploaded as it is, with the licence in its card.
        repository: 'owner/name'; made if it is not there.
        private: of a new repository.
        license: of the weights, by the hub's short name, such as 'apache-2.0'.
        message: of the commit.
        revision: a branch, made if it is not there.
        dtype: of the weights: 'float32', 'bfloat16' or 'float16'.
        folder: write the repository here, upload nothing, and return this path.
        dry_run: the same, in hub/NAME.
        overwrite: replace such a folder.
        weights: which weights, as `load` takes them, for a path.
        device: where the grid is sampled, for a path.
        trust_code: as `load` takes it, for a path.

    Raises:
        UserError: there is no token or no connection, the hub refuses, or the model cannot be read or sampled.
    """
    check_repository(repository, license, revision)
    dry_run = dry_run or folder is not None
    if not dry_run:
        check_token()
    if isinstance(model, str):
        model = Path(model)
    exported = model if isinstance(model, Path) and is_export(model) else None
    if exported and (weights or dtype != "float32"):
        raise UserError(f"{model} is an export, whose weights and dtype were chosen when it was made; leave them out")

    def write(target: Path) -> Path:
        check_target(target, "export" if exported else "model", overwrite)
        if exported:
            return write_exported(exported, target, repository, license, revision)
        given = model if isinstance(model, Checkpoint) else load(model, device, weights=weights, trust_code=trust_code)
        return write_repository(given, target, repository, license, dtype, revision, overwrite)

    if dry_run:
        return str(write(Path(folder or FOLDERS / repository.partition("/")[2])))
    with tempfile.TemporaryDirectory() as place:
        return _upload(write(Path(place) / "model"), repository, private, message, revision)


def _upload(folder: Path, repository: str, private: bool, message: str | None, revision: str | None) -> str:
    """One commit with all files of `folder`; the hub checks the card before the weights are sent."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    offline_without_network()
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    names = [file.relative_to(folder).as_posix() for file in files]
    with _explained(repository):
        api = HfApi(library_name="dic-repa")
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = api.list_repo_files(repository, revision=revision)
        # What an earlier upload has left, such as its scores. Of a repository of something else nothing is removed.
        ours = {MANIFEST, RECIPE} <= set(there)
        gone = [name for name in FILES if ours and name in there and name not in names]
        commit = api.create_commit(
            repository,
            [*(CommitOperationAdd(name, str(folder / name)) for name in names), *map(CommitOperationDelete, gone)],
            commit_message=message or "Upload by dic-repa push",
            revision=revision,
        )
    return commit.commit_url


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """An error of the hub's client in the block, of which there are a dozen kinds, is one line."""
    try:
        yield
    except Exception as error:
        response: Any = getattr(error, "response", None)
        hint = {
            400: "mend it, such as --license, and look at the card with --dry-run",
            401: "the hub does not know this token: log in anew with `hf auth login`",
            403: f"this token may not write to {repository}: take one of the kind `write`, and a repository of yours",
        }.get(getattr(response, "status_code", 400 if isinstance(error, ValueError) else 0), "try again later")
        why = str(error) if isinstance(error, ValueError) and response is None else first_line(error)
        raise UserError(f"{repository} was not uploaded ({type(error).__name__}: {why}); {hint}") from None
