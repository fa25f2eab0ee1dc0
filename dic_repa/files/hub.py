"""The Hugging Face hub, where there is no network."""

from __future__ import annotations

import functools
import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit


@functools.cache
def offline_without_network() -> None:
    """Switch to the hub's offline mode where its name cannot be looked up: what is in the cache is found all the same,
    and what is not is missed at once, where huggingface_hub would try again for a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # a proxy looks names up itself
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported from here on, and for processes
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
