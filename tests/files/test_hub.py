"""The hub without a network: missed at once, not after a minute of trying again; and downloads pinned to a commit."""

from __future__ import annotations

import json
import socket

import huggingface_hub
import huggingface_hub.errors
import pytest
from huggingface_hub import constants

from dic_repa.files import hub
from dic_repa.files.hub import offline_without_network, use_pins
from dic_repa.models import DiC
from dic_repa.runs.environment import describe_environment
from dic_repa.runs.folder import RunFolder


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


def publish(cache, commit: str, channels: int) -> None:
    """A version of someone/dic as the hub's client keeps it in its cache, which is then `main`."""
    folder = cache / "models--someone--dic"
    DiC(4, (1, 1, 1, 1, 1), in_channels=channels, num_classes=2).save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_downloads_are_pinned_and_kept_in_the_records(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "PINS", {})
    monkeypatch.setattr("dic_repa.runs.environment.PINS", hub.PINS)
    publish(tmp_path / "cache", "a" * 40, channels=1)
    assert DiC.from_pretrained("someone/dic").in_channels == 1
    record = describe_environment("cpu", 1)
    assert record["downloads"] == {"someone/dic": "a" * 40}

    publish(tmp_path / "cache", "b" * 40, channels=3)  # somebody has uploaded another
    assert DiC.from_pretrained("someone/dic").in_channels == 1  # not in the midst of a run
    hub.PINS.clear()
    assert DiC.from_pretrained("someone/dic").in_channels == 3
    (tmp_path / "environment.json").write_text(json.dumps([record]))
    use_pins(RunFolder(tmp_path).downloads())  # as a resumed run does
    assert DiC.from_pretrained("someone/dic").in_channels == 1
    assert DiC.from_pretrained(f"someone/dic@{'b' * 40}").in_channels == 3
