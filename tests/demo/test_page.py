"""The page of `dic-repa demo`: its address, what its buttons answer, and how it looks in Chromium."""

from __future__ import annotations

import functools
import importlib.util
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from browser import Browser
from report_runs import needs_browser
from small_samplers import write_tiny_checkpoint

pytest.importorskip("gradio")

from gradio_client import Client
from gradio_client.exceptions import AppError

from dic_repa.demo.address import listen
from dic_repa.demo.models import Models
from dic_repa.demo.page import Page
from dic_repa.demo.server import make_server
from dic_repa.errors import UserError

SAMPLE = "[...document.querySelectorAll('button')].find(button => button.textContent.trim() == 'Sample')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two checkpoints, and its address."""
    folder = tmp_path_factory.mktemp("demo")
    environment = pytest.MonkeyPatch()
    environment.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
    models = Models([write_tiny_checkpoint(folder / "one"), write_tiny_checkpoint(folder / "two")])
    with listen("127.0.0.1", 0) as listening:
        page = Page(models)
        server = make_server(page)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        page.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield page
        page.stop_all()
        server.should_exit = True
        thread.join(timeout=20)
    environment.undo()


@pytest.fixture(scope="module")
def client(page):
    return Client(page.address, verbose=False)


def sampled(client: Client, **changes):
    """The answers to a press on Sample, one after another."""
    choices = {
        "models": ["one"], "classes": [], "num": 2, "solver": "euler", "steps": 2, "tolerance": 1e-5, "scale": 1.0,
        "begin": 0.0, "end": 1.0, "seed": 0,
    }  # fmt: skip
    return client.submit(*(choices | changes).values(), api_name="/sample")


def test_samples_come_one_after_another(client):
    first, *_, last = sampled(client, models=["one", "two"], num=20, classes=["3", "7"])
    assert first[0].count('class="dic-empty"') == 2 * 20
    assert "dic-empty" not in last[0]
    assert last[0].count("2 network evaluations an image") == 2
    assert last[0].count("<figcaption") == 2 * 20
    lines = last[1]["value"] if isinstance(last[1], dict) else last[1]
    assert [line.startswith("dic-repa sample ") for line in lines.splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"begin": 0.7, "end": 0.2, "scale": 2.0}, "interval must rise"),
        ({"classes": ["3", "(no class)"]}, "choose either"),
        ({"models": []}, "no checkpoint is chosen"),
    ],
)
def test_what_does_not_fit_is_a_message(client, capfd, changes, message):
    with pytest.raises(AppError, match=message):
        sampled(client, **changes).result()
    assert "Traceback" not in capfd.readouterr().err


def test_an_unexpected_error_is_a_message_too(client, page, capfd, monkeypatch):
    def broken(title):
        raise RuntimeError("<b>broken</b> inside\nmore")

    monkeypatch.setattr(page.models, "get", broken)
    with pytest.raises(AppError) as error:
        sampled(client).result()
    assert "RuntimeError: &lt;b&gt;broken&lt;/b&gt; inside" in str(error.value)
    assert "Traceback" in capfd.readouterr().err


def test_one_samples_at_a_time_and_stop_ends_it(client, page):
    long = sampled(client, num=64, steps=250)
    while not long.outputs():
        time.sleep(0.05)
    assert not page.models.at_work.acquire(blocking=False)
    other = Client(page.address, verbose=False)
    other.predict(api_name="/stop")  # is of another window, and ends nothing
    waiting = sampled(other)
    time.sleep(0.3)
    assert page.say_if_busy(SimpleNamespace(session_hash=other.session_hash)).count("Another window is sampling")
    assert not long.done()
    assert not waiting.outputs()
    client.predict(api_name="/stop")
    assert "stopped" in long.outputs()[-1][0] or "stopped" in long.result()[0]
    assert "2 network evaluations" in list(waiting)[-1][0]


def test_nothing_else_is_served(page, checkpoint):
    """No file of the disk, no upload, and no answer without the policy."""
    for path in (f"/gradio_api/file={checkpoint / 'recipe.yaml'}", "/gradio_api/file=/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(page.address + path)
        assert error.value.code in (403, 404)
    with urllib.request.urlopen(page.address) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "<script" in answer.read().decode()


def test_a_port_in_use(mistake, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = mistake("demo", checkpoint, "--port", port)
        assert f"port {port} is in use; take another, such as --port " in line
        with socket.create_server(("127.0.0.1", int(line.rpartition(" ")[2]))):
            pass  # which is free
    with pytest.raises(UserError, match="name another --host"):
        listen("203.0.113.1", 0)


def test_what_is_no_run(mistake, tmp_path):
    assert "there is no run or checkpoint folder" in mistake("demo", tmp_path / "nowhere")
    assert "neither a run nor a checkpoint" in mistake("demo", tmp_path)


def test_without_gradio(mistake, checkpoint, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gradio" else found(name))
    assert "pip install 'dic-repa[demo]'" in mistake("demo", checkpoint)


@pytest.mark.slow
def test_the_command(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    command = [sys.executable, "-m", "dic_repa", "demo", checkpoint, "--port", "0"]
    # What starts tests in the background lets them ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, preexec_fn=heed)
    try:
        line = process.stdout.readline()
        address = line.split()[4].rstrip(";")
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
        assert (process.returncode, error.strip()) == (130, "the demo has ended")
    finally:
        process.kill()


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (390, 844, True)])
def test_in_a_browser(page, tmp_path, monkeypatch, width, height, dark):
    nasty = "<img src=x onerror='window.hurt=1'>${window.hurt=1}{{window.hurt=1}}"
    monkeypatch.setattr(page.models.get("one").condition, "names", (nasty, *map(str, range(1, 10))))
    with Browser(tmp_path, width, height, dark) as browser:
        browser.open(page.address)
        browser.wait_for(SAMPLE)
        browser.run(f"{SAMPLE}.click()")
        browser.wait_for("document.querySelectorAll('.dic-done').length == 2")
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.run("document.querySelector('figcaption').textContent") == nasty
        assert browser.run("window.hurt === undefined")
        left = "[...document.querySelectorAll('.dic-model')].map(card => card.getBoundingClientRect().left)"
        assert len(set(browser.run(left))) == (2 if width > 1000 else 1)  # side by side, or below each other
        assert browser.run("[...document.querySelectorAll('.cm-content')].some(e => e.textContent.includes('--num'))")
        assert all(request.startswith((page.address, "data:", "blob:", "about:")) for request in browser.requests)
        assert not [line for line in browser.console if "404" not in line]  # Gradio 5 looks for a manifest
