"""The Hugging Face hub: without a network, and with each download pinned to a commit."""

import contextlib
import functools
import os
import socket
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

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
        with contextlib.suppress(OSError):  # what "main" was at the last download
            commit = commit or (folder / "refs" / (revision or "main")).read_text().strip()
        if commit:
            PINS[name] = commit
    return repository, PINS.get(name, revision or None)


def use_pins(commits: Mapping[str, str]) -> None:
    """Take from now on these commits, as a run's records have them."""
    PINS.update(commits)
