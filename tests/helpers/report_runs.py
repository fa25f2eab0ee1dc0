"""Run folders as training leaves them, with values that are known, and the report of them in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from dic_repa.recipe import load_recipe
from dic_repa.runs.folder import RunFolder

NASTY = "</script><script>window.hurt = 1</script><img src=http://example.com/x.png>"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def report_run(
    folder: Path, *overrides: str, steps: int = 40, done: int = 40, recipe: str = "digits-urepa"
) -> RunFolder:
    """A run's folder with curves, pictures, scores and a probe."""
    run = RunFolder(folder)
    run.create(load_recipe("digits-urepa", [f"train.steps={steps}", *overrides]))
    lines = [
        {"step": s, "loss": 2 / s, "denoising": 1 / s, "alignment.0.token": -s / 100, "gradient_norm": 1.0}
        for s in range(1, done + 1)
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (10, 20):
        Image.new("RGB", (8, 6), (step, 0, 0)).save(run.samples / f"step_{step:08d}.png")
    run.environment_file.write_text(json.dumps([{"command": ["dic-repa", "train"], "packages": {"torch": "2.5"}}]))
    (run.path / "evaluation").mkdir()
    judged(run, "a", 40, {"recognised": 0.9, "fd-digits": 1.5, "by": {"0": 1}, "reference": {"fd-digits": 1.25}})
    (run.path / "probe").mkdir()
    probe = {"step": 40, "encoder": "digits-vit", "times": [0.1, 0.5], "taps": ["enc.0.0", "mid.0"]}
    probe |= {"aligned": ["mid.0"], "scores": {"cka": [[0.1, 0.2], [0.3, float("nan")]]}}
    (run.path / "probe/probe.json").write_text(json.dumps(probe))
    return run


def judged(run: RunFolder, name: str, step: int, scores: dict) -> None:
    """Leave a record of judged samples."""
    record = {
        "step": step,
        "metric": "digits",
        "sample": {"num": 9},
        "evaluations": 39,
        "scores": {"count": 9} | scores,
    }
    (run.path / f"evaluation/{name}.json").write_text(json.dumps(record))


def drawn(page: Path, window: str = "1280,900") -> str:
    """The page as its script leaves it, without its data.

    What it says in the console fails the test. A request to a network would be there too: the page's own policy forbids
    all, and Chromium tells of each refusal.
    """
    options = [*QUIET.split(), f"--user-data-dir={page.parent / 'profile'}", f"--window-size={window}", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return re.sub(r'<script id="data".*?</script>', "", done.stdout, flags=re.DOTALL)
