"""The Hugging Face hub without a network."""

import functools
import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit


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
