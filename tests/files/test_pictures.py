"""The plots that runs and verbs leave behind, by what is drawn in them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from dic_repa.evaluation.solvers import Point, save_comparison
from dic_repa.evaluation.tune import Cell, save_heat_map
from dic_repa.files.pictures import draw_grid, load_png, save_picture
from dic_repa.runs.folder import RunFolder
from dic_repa.training.log import save_curves


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, the newest last."""
    drawn = []

    def savefig(figure, *arguments, **options):
        drawn.append(figure)
        write(figure, *arguments, **options)

    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def test_curves_of_a_single_point_are_seen(tmp_path, figures):
    run = RunFolder(tmp_path)
    run.metrics_file.write_text(json.dumps({"step": 2, "loss/denoising": 1.5, "denoising": 1.5}) + "\n")
    save_curves(run)
    lines = figures[-1].axes[0].lines
    assert [line.get_marker() for line in lines] == ["o"]


def test_curves_show_the_terms_of_an_own_alignment_loss(tmp_path, figures):
    run = RunFolder(tmp_path)
    lines = [{"step": s, "denoising": 1 / s, "alignment.0.token": -0.5, "alignment.1.squared": s} for s in (1, 2)]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_curves(run)
    denoising, token, squared = figures[-1].axes
    assert (denoising.get_title(), squared.get_title()) == ("denoising loss", "squared, of the alignment")
    assert list(token.lines[0].get_ydata()) == [0.5, 0.5]
    assert list(squared.lines[0].get_ydata()) == [1, 2]


def test_headings_of_a_grid_are_above_its_columns(tmp_path):
    images, rows = torch.zeros(6, 1, 8, 8), torch.arange(2).repeat_interleave(3)
    for name, headings in (("without", ()), ("with", ("t=1.00", "t=0.50", "t=0.00"))):
        save_picture(draw_grid(images, rows, ["", ""], 3, headings=headings), tmp_path / f"{name}.png")
    without, headed = (load_png(tmp_path / f"{name}.png") for name in ("without", "with"))
    extra = headed.shape[1] - without.shape[1]
    assert torch.equal(headed[:, extra:], without)
    thirds = headed[0, :extra, 16:].chunk(3, dim=1)
    assert all(part.min() < 0.5 for part in thirds)


def test_small_images_of_a_grid_are_enlarged_and_large_ones_are_left():
    for size, cell in ((8, 48), (32, 64), (48, 48), (64, 64)):
        grid = draw_grid(torch.zeros(9, 3, size, size), torch.arange(9), [""] * 9, 1)
        black = torch.tensor([[grid.getpixel((x, y))[0] == 0 for x in range(grid.width)] for y in range(grid.height)])
        assert black.sum() == 9 * cell**2


def test_a_heat_map_names_its_score_in_words(tmp_path, figures):
    cells = [Cell(scale, (0.0, 0.7), 100, scale) for scale in (1.0, 2.0)]
    for score, title in (("fd-digits", "FD-digits (lower"), ("fid", "FID (lower")):
        save_heat_map(tmp_path / "tune.png", score, "lower", [(0.0, 0.7)], cells, [])
        assert any(text.get_text().startswith(title) for text in figures[-1].findobj(Text))


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.0)])
def test_the_title_of_a_small_heat_map_is_all_there(tmp_path, figures, scales):
    cells = [Cell(scale, (0.0, 0.7), 50_000, scale) for scale in scales]
    save_heat_map(tmp_path / "tune.png", "prec-dinov2", "higher", [(0.0, 0.7)], cells, cells)
    figure = figures[-1]
    (title,) = [text for text in figure.findobj(Text) if "confirmed with" in text.get_text()]
    extent = title.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert figure.bbox.x0 <= extent.x0
    assert extent.x1 <= figure.bbox.x1
    assert extent.y1 <= figure.bbox.y1


def test_costs_of_solvers_are_written_out(tmp_path, figures):
    save_comparison(
        [Point("heun", n, {"recognised": 0.5, "fd-digits": 10.0 + n}) for n in (6, 12, 13, 24, 48)],
        tmp_path / "solvers.png",
    )
    figure = figures[-1]
    for axis in figure.axes:
        figure.canvas.draw()
        assert [label.get_text() for label in axis.get_xticklabels()] == ["6", "12", "24", "48"]
        assert not any(label.get_text() for label in axis.get_xticklabels(minor=True))


@pytest.mark.parametrize("unit", [1, 0.1])
def test_scores_of_solvers_are_plain_numbers(tmp_path, figures, unit):
    points = [Point("heun", n, {"fd-digits": unit * (5 + n / 100)}) for n in (6, 12, 24, 48)]
    save_comparison(points, tmp_path / "solvers.png")
    figure = figures[-1]
    figure.canvas.draw()
    axis = figure.axes[0]
    labels = [label.get_text() for which in (False, True) for label in axis.get_yticklabels(minor=which)]
    assert all(re.fullmatch(r"\d*\.?\d*", label) for label in labels)  # no 5.3 x 10^0, no 5e-01
    assert len([label for label in labels if label and 5 * unit < float(label) < 5.5 * unit]) >= 2
