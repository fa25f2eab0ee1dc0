"""`bench poster`: the poster's numbers, ratios to DiT-XL/2, and a system that fails costs its rows alone."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from dic_repa.bench import poster
from dic_repa.bench.budget import Budget
from dic_repa.bench.peaks import rounding
from dic_repa.bench.poster import SYSTEMS, System, bench_poster
from dic_repa.bench.timing import Settings
from dic_repa.bench.timing import interleave as timing
from dic_repa.cli import bench_poster as verb
from dic_repa.cli import main

CPU = torch.device("cpu")
# The poster's "TP" at 256 and 512 px, typed from its picture.
POSTER = {
    "U-ViT-XL/2": {256: 72.6},
    "DiT-XL/2": {256: 66.8, 512: 16.2},
    "PixArt-alpha-XL/2": {256: 64.1},
    "DiffiT-XL/2": {256: 64.1},
    "DiT-LLaMA-XL/2": {256: 65.2},
    "DiC-XL": {256: 313.7, 512: 84.2},
    "DiC-H": {256: 160.8, 512: 53.3},
}
TINY = {
    "DiT-XL/2": System("DiT-XL/2", {"width": 16, "depth": 1, "num_heads": 1}, {256: 66.8}),
    "DiC-XL": System("DiC-XL", {"width": 8, "depths": (1, 1, 1, 1, 1)}, {256: 313.7}),
    "SongUNet": System("Song-Net", {}),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(poster, "SYSTEMS", TINY)
    monkeypatch.setattr(poster, "PIXELS", {256: 8})
    monkeypatch.setattr(poster, "measure_peak", lambda *_: {"matrix": 1.0, "convolution": 2.0})


def test_numbers_of_the_poster():
    assert {name: dict(system.poster) for name, system in SYSTEMS.items() if system.poster} == POSTER
    assert {*SYSTEMS} - {*POSTER} == {"SongUNet", "DiCo-XL", "FCDM-XL"}
    assert [*SYSTEMS] == [*verb._SYSTEMS.one.choices]


def test_command(tmp_path, capsys):
    words = ["--size=256", "--batch=1", "--rounds=1", "--seconds=0", "--compile=off", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "poster", "--small", "--device=cpu", "--only=DiT-XL/2,SongUNet,DiC-XL", *words])
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "out/poster.json").read_text())
    dit, song, dic = saved["rows"]
    assert dit["ratio"] == 1
    assert dic["ratio"] > 0
    assert "ratio" not in song
    assert dic["poster_ratio"] == pytest.approx(4.7, abs=0.01)
    assert dic["matrix_share"] == pytest.approx(2 * dic["convolution_share"])
    assert dic["tflops"] == pytest.approx(2 * dic["gmacs"] * dic["images_per_second"] / 1000)
    assert "images_per_second" not in song
    assert "unknown denoiser 'Song-Net'" in song["failed"]
    assert "unknown denoiser 'Song-Net'" in printed
    assert "a quarter of its width" in printed
    assert Image.open(tmp_path / "out/poster.png").width > 500


def test_a_case_that_cannot_be_compiled_costs_its_row(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(poster, "CompiledDenoiser", lambda *_: no_compiler)
    turns = []
    monkeypatch.setattr(poster, "interleave", lambda calls, *a, **o: turns.append(len(calls)) or timing(calls, *a, **o))
    settings = Settings(CPU, compiles=("off", "blocks"), batches=(1,), rounds=1, seconds=0.0)
    *_, result = bench_poster(settings, [256], ["DiC-XL", "DiT-XL/2"], small=True)
    eager, compiled = result["rows"][2:]
    assert turns == [1, 2]  # DiT-XL/2 alone, then DiC-XL with it
    assert eager["images_per_second"] > 0
    assert compiled["failed"] == "RuntimeError: no C++ compiler was found"


def test_no_system_is_begun_when_the_budget_is_spent():
    settings = Settings(CPU, batches=(1,), rounds=1, seconds=0.0)
    (result,) = bench_poster(settings, [256], ["DiC-XL"], small=True, budget=Budget(5))
    assert result["rows"][0]["failed"] == "left out: 5 s left of the budget, it takes about 20"


def test_flags_of_torch_default(mistake):
    with rounding("torch-default"):
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    words = ["bench", "poster", "--small", "--device=cpu"]
    assert "torch-default is a precision of NVIDIA GPUs" in mistake(*words, "--precision=torch-default")
    assert "'DiT' is not one of 'DiT-XL/2'" in mistake(*words, "--only=DiT")
    assert "take --small" in mistake("bench", "poster", "--device=cpu")
