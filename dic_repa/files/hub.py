"""The Hugging Face hub: without a network, with each download pinned to a commit, and who may upload what."""

import contextlib
import functools
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from dic_repa.errors import UserError, first_line
from dic_repa.files.manifest import MANIFEST, read_manifest

SMALL_FILES = (
    "config.json",
    "recipe.yaml",
    "data.json",
    "scores.json",
    MANIFEST,
)  # of a model's folder, but for its weights
PINS: dict[str, str] = {}  # what this process takes from the hub: 'org/name' or 'org/name@revision' to its commit


@functools.cache
def offline_without_network() -> None:
    """Use the hub's offline mode if its host cannot be found: huggingface_hub would try again for a minute, even for
    what is in its cache.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # a proxy looks names up itself
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for later imports and for child processes
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def pin(name: str, kind: str = "model") -> tuple[str, str | None]:
    """The repository in `name`, 'org/name' or 'org/name@revision', and the commit that all its files are taken from.

    The same commit each time in a process, and that of `use_pins` before. It is None where the hub cannot be asked and
    nothing of the repository is in its cache.
    """
    from huggingface_hub import HfApi, constants

    offline_without_network()
    repository, _, revision = name.partition("@")
    if name not in PINS:
        commit = None
        with contextlib.suppress(Exception):  # the client raises a dozen kinds; to fetch the file says it better
            commit = HfApi().repo_info(repository, repo_type=kind, revision=revision or None, timeout=10).sha
        folder = Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}")
        ref = folder / "refs" / (revision or "main")
        if commit and commit != revision and ".." not in ref.parts:
            _note(ref, commit)
        with contextlib.suppress(OSError):  # what "main" was at the last download
            commit = commit or ref.read_text().strip()
        if commit:
            PINS[name] = commit
    return repository, PINS.get(name, revision or None)


def _note(ref: Path, commit: str) -> None:
    """Write into the client's cache what a branch is now, so that its files are found there without a network.

    The client does so itself for a branch, but not for the commits that we ask it for.
    """
    with contextlib.suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def use_pins(commits: Mapping[str, str]) -> None:
    """Take from now on these commits, as a run's records have them."""
    PINS.update(commits)


def check_repository(repository: str, license: str | None = None, branch: str | None = None) -> None:
    """A UserError for a repository, a licence or a branch that the hub would not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"'{repository}' is no repository of the hub ({first_line(error)}); name OWNER/NAME") from None
    if repository.count("/") != 1:
        raise UserError(f"'{repository}' names no owner; name OWNER/NAME, such as your-name/{repository}")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"'{license}' is no short name of a licence; such are apache-2.0, mit, cc-by-4.0 and other")
    if branch is not None and not re.fullmatch(r"\w[\w./-]*", branch, flags=re.ASCII):
        raise UserError(f"'{branch}' is no name for a branch; take letters, digits, '.', '-' and '_'")


def check_token() -> None:
    """A UserError that says how to log in, if nobody is."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("no token for the hub: log in with `hf auth login`, or set HF_TOKEN; --dry-run needs none")


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` reads 'owner/name' or 'owner/name@revision', and no folder here does."""
    owner, slash, rest = str(name).partition("@")[0].partition("/")
    named = slash and rest and "/" not in rest and not owner.startswith((".", "~"))
    return bool(named and owner not in ("", "runs") and not Path(owner).is_dir())


def fetch_model(name: str, hint: str = "") -> Path:
    """The folder in the hub's cache that holds the model of a hub id: its weights and what lies with them.

    Files that do not belong to it are left on the hub. `hint` ends the message where nothing is found.

    Raises:
        UserError: the hub cannot be reached and the model is not in the cache, or there is no model of that name.
    """
    from huggingface_hub import snapshot_download

    try:
        repository, commit = pin(name)
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=list(SMALL_FILES)))
        if (folder / "config.json").is_file():
            listed = [file for file in read_manifest(folder).get("files", {}) if not set("*?[") & set(file)]
            wanted = ["model.safetensors", *SMALL_FILES, *listed]
            return Path(snapshot_download(repository, revision=commit, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen kinds, from no connection to no such repository
        raise UserError(
            f"there is no folder {name}, and the hub does not give it ({type(error).__name__}: {first_line(error)}); "
            f"download that repository into a folder and name the folder{hint}"
        ) from None
    raise UserError(f"{name} on the hub is no model of dic-repa: it has no config.json")
