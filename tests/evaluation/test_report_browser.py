"""The report's page in a browser: what its script draws of runs whose values are known."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from report_runs import NASTY, drawn, judged, needs_browser, report_run

from dic_repa.evaluation.report import write_report

pytestmark = needs_browser


def article(page: str, title: str) -> str:
    """The card of this title among the metrics."""
    metrics = page[page.index('<section id="metrics"') :]
    (found,) = [
        card for card in re.findall(r"<article.*?</article>", metrics, flags=re.DOTALL) if f"<h3>{title}<" in card
    ]
    return found


@pytest.mark.parametrize("window", ["390,844", "1280,900"])
def test_all_is_drawn(tmp_path, window):
    """The script runs to its end on nasty names and gaps, and draws each section."""
    runs = [
        report_run(tmp_path / "first", f"description={json.dumps(NASTY)}"),
        report_run(tmp_path / "<b>second {{DATA}}", done=7),
    ]
    shutil.rmtree(runs[1].samples)
    page = drawn(write_report([run.path for run in runs], tmp_path / "page.html"), window)
    for identifier in ("curves", "samples", "metrics", "alignment", "recipe", "machine"):
        assert f'<section id="{identifier}"' in page
    assert page.count('class="curve"') >= 6
    assert "&lt;b&gt;second" in page
    assert "&lt;img src=http" in page
    assert "<img src=http" not in page
    assert page.rstrip().endswith("</html>")


def test_a_run_of_a_single_score_is_beside_one_of_many(tmp_path):
    many, one = report_run(tmp_path / "many"), report_run(tmp_path / "one")
    for step in (10, 20, 30):
        judged(many, f"at{step}", step, {"recognised": step / 100, "fd-digits": 50.0 / step})
    chart = article(drawn(write_report([many.path, one.path], tmp_path / "page.html")), "Recognised")
    assert chart.count('class="point"') == 4 + 1
    assert "one ends at 0.9" in chart


def test_a_lone_number_has_a_bar_only_as_a_share_of_all(tmp_path):
    page = drawn(write_report([report_run(tmp_path / "a").path], tmp_path / "page.html"))
    assert 'style="width:90%"' in article(page, "Recognised")  # of 1
    run = report_run(tmp_path / "b")
    judged(run, "a", 40, {"fd-digits": 1.5})  # no real digits to compare with
    page = drawn(write_report([run.path], tmp_path / "other.html"))
    assert 'class="track"' not in article(page, "FD-digits")


def test_steps_are_whole_numbers(tmp_path):
    page = drawn(write_report([report_run(tmp_path / "a", steps=10, done=10).path], tmp_path / "page.html"))
    labels = re.findall(r'<text [^>]*text-anchor="middle"[^>]*>([^<]*)</text>', page[: page.index('id="samples"')])
    assert "5" in labels
    assert not [label for label in labels if "." in label]
