"""--quiet and --verbose: how much is said besides results, warnings and errors."""

from __future__ import annotations

import logging

import pytest

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.models import DiC
from dic_repa.recipe import load_recipe, to_yaml
from dic_repa.runtime import progress


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(variable, "0")
    yield
    progress.set_verbosity("normal")


@pytest.fixture
def sample(tmp_path, capsys):
    """Call `dic-repa sample` with further arguments; returns what it printed."""
    DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text(to_yaml(load_recipe("digits-baseline", ["sample.steps=1"])))

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([*arguments, "--out", str(tmp_path / "out")])
        assert exit.value.code == 0
        return capsys.readouterr()

    return lambda before, num, after: run(*before, "sample", str(tmp_path / "model"), "--num", str(num), *after)


def test_quiet_prints_results_alone(sample):
    said = sample([], 2, [])
    assert "sampling" in said.err  # the bar
    for before, after in (["--quiet"], []), ([], ["--quiet"]):  # wherever it stands
        said = sample(before, 6 if before else 8, after)
        assert said.err == ""
        assert said.out.startswith("6 images" if before else "8 images")


def test_verbose_says_what_is_read(sample, tmp_path):
    said = sample(["--verbose"], 2, []).err
    assert f"weights: {tmp_path / 'model'}" in said
    assert "weights: " not in sample([], 4, []).err


def test_errors_are_told_when_quiet(mistake):
    assert mistake("--quiet", "trian") == "error: unknown verb 'trian'; did you mean train?"
    assert mistake("recipes", "--quiet", "--verbose") == "error: --quiet and --verbose exclude each other"


def test_levels_from_python(capsys):
    for level, shown in (("quiet", ""), ("normal", "a note\n"), ("verbose", "a note\na detail\n")):
        progress.set_verbosity(level)
        progress.say("a note")
        progress.detail("a detail")
        assert capsys.readouterr().err == shown
        with progress.progress_bar(total=1) as bar:
            assert bar.disable == (level == "quiet")
        assert ("0/1" in capsys.readouterr().err) != (level == "quiet")
    assert logging.getLogger("timm").level == logging.INFO
    with pytest.raises(UserError, match="unknown verbosity 'quite'; did you mean quiet"):
        progress.set_verbosity("quite")


def test_only_the_main_process_says_something(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    progress.say("a note")
    assert capsys.readouterr().err == ""
