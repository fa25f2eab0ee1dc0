"""The hub without a network: missed at once, not after a minute of trying again."""

from __future__ import annotations

import socket

import huggingface_hub
import huggingface_hub.errors
import pytest
from huggingface_hub import constants

from dic_repa.files.hub import offline_without_network


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that what is set below is undone
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    offline_without_network.cache_clear()
    yield
    offline_without_network.cache_clear()


def unknown(*_):
    raise socket.gaierror(-2, "Name or service not known")


def test_offline_where_the_name_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    offline_without_network()
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError) as caught:
        huggingface_hub.hf_hub_download("someone/something", "model.safetensors", cache_dir=tmp_path)
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.OfflineModeIsEnabled)


def test_online_where_it_is_known(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [()])
    offline_without_network()
    assert not huggingface_hub.is_offline_mode()


def test_a_proxy_may_know_the_name(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    offline_without_network()
    assert not huggingface_hub.is_offline_mode()
