"""The bench: what it counts and says, not how fast anything is."""

from __future__ import annotations

import json
import threading
import weakref

import pytest
import torch
from PIL import Image
from places import HELPERS
from small_runs import small_recipe
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from dic_repa.bench.device import look_inside, read_clocks
from dic_repa.bench.model import bench_model, load_factory, randomise
from dic_repa.bench.sample import bench_sample
from dic_repa.bench.timing import Settings, add_ratios, interleave, speed, table
from dic_repa.bench.train import build_step, prepare_recipe, replace_denoiser
from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.files.outputs import MARK
from dic_repa.models import create_denoiser
from dic_repa.training.dry_run_steps import sampled_power

CPU = torch.device("cpu")
ORACLE = HELPERS / "oracle.py"
SHORT = {"rounds": 2, "seconds": 0.0}


def test_calls_take_turns_after_a_warm_up():
    made = []
    timings = interleave([lambda: made.append("a"), lambda: made.append("b")], rounds=3, seconds=0.0, warmup=2)
    assert "".join(made) == "aabb" + "ab" + "ba" + "ab"
    assert [len(timing.times) for timing in timings] == [3, 3]


def test_median_and_quartiles():
    seconds = Measurement(2, [8.0, 2.0, 4.0, 6.0, 200.0], TaskSpec("call()", ""))  # of two calls each
    assert speed(seconds, images=12) == {"images_per_second": 4, "spread": [3, 6], "milliseconds": 3000}


def test_ratios_are_to_the_first_of_the_same_batch():
    rows = [{"batch": b, "images_per_second": v} for b, v in ((1, 2.0), (8, 10.0), (1, 3.0), (8, 5.0))]
    add_ratios(rows)
    assert [row["ratio"] for row in rows] == [1, 1, 1.5, 0.5]
    assert table(rows).splitlines()[0].split() == ["batch", "images/s", "to", "first"]


def test_memory_and_convolutions_of_a_known_call():
    x, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)
    repeated = look_inside(lambda: x.repeat(4, 1, 1, 1), CPU)
    assert 4 <= repeated["memory_mb"] <= 4.3  # four times x's megabyte, and a bit
    assert repeated["time_in_convolutions"] == 0
    assert look_inside(lambda: torch.conv2d(x, weight), CPU)["time_in_convolutions"] > 0.9


def test_model_beside_the_oracle():
    settings = Settings(CPU, ("fp32", "bf16"), batches=(1,), baselines=[f"DiC-S={ORACLE}:OracleDiC"], **SHORT)
    result = bench_model(["DiC-S"], settings, size=8, peaks=False)
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["DiC-S fp32 eager", "DiC-S fp32 by OracleDiC", "DiC-S bf16 eager", "DiC-S bf16 by OracleDiC"]
    # DiC's table: 5.87 GMACs at 32x32, which go with the area but for the conditioning.
    assert rows["DiC-S fp32 eager"]["gmacs"] == pytest.approx(5.87 / 16, rel=0.02)
    assert rows["DiC-S fp32 by OracleDiC"]["difference"] < 1e-5
    assert 1e-4 < rows["DiC-S bf16 eager"]["difference"] < 0.1
    assert result["environment"]["threads"] == torch.get_num_threads()


def test_rows_with_and_without_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr("dic_repa.models.blocks.use_kernels", lambda block, x: asked.append(block.kernels))
    settings = Settings(CPU, batches=(1,), kernels=("auto", "off"), **SHORT)
    rows = bench_model(["DiC-S"], settings, size=8, peaks=False)["rows"]
    assert [row["label"] for row in rows] == ["DiC-S fp32 eager", "DiC-S fp32 without kernels eager"]
    blocks = 29
    assert asked[blocks : 2 * blocks] == [False] * blocks  # the reference, after the cost was counted
    assert sum(asked) == len(asked[2 * blocks :]) / 2 > blocks


@pytest.mark.parametrize(("solver", "evaluations"), [("euler_maruyama", 2), ("dopri5", 3)])
def test_a_sampler_is_profiled_over_two_steps(monkeypatch, solver, evaluations):
    profiled = []
    monkeypatch.setattr("dic_repa.bench.sample.look_inside", lambda case, _: profiled.append(case()) or {"case": case})
    steps = "null" if solver == "dopri5" else 12
    overrides = ["model.width=8", "model.depths=[1,1,1,1,1]", f"sample.solver={solver}", f"sample.steps={steps}"]
    (row,) = bench_sample(["digits-urepa"], Settings(CPU, batches=(2,), **SHORT), overrides)["rows"]
    assert len(profiled) == 1
    assert row["case"].sampler.evaluations == evaluations
    assert row["evaluations"] > 10


def test_a_baseline_does_not_keep_what_it_replaces(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = small_recipe()
    parts, accelerator = build_step(recipe, CPU)
    replaced = [weakref.ref(part) for part in (parts.denoiser, parts.ema.model, parts.optimizer.optimizer)]
    replace_denoiser(parts, f"{ORACLE}:OracleDiC", recipe, accelerator)
    assert [part() for part in replaced] == [None] * 3


@pytest.mark.parametrize(("kind", "of_recipe", "found"), [
    ("bf16", True, True), ("bf16", False, False), ("fp16", True, True), ("fp32", True, False), ("tf32", False, True),
])  # fmt: skip
def test_half_precision_leaves_tf32_to_the_recipe(kind, of_recipe, found):
    recipe = prepare_recipe("digits-urepa", [f"train.tf32={str(of_recipe).lower()}"], kind, 1, [])
    assert recipe.train.tf32 == found


def test_nothing_is_left_at_zero():
    denoiser = randomise(create_denoiser("SiT-S/2"))
    assert all(parameter.any() for parameter in denoiser.parameters() if parameter.ndim > 1)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--size=8", "--batch=1", "--rounds=1", "--seconds=0", "--no-peak"]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "model", "DiC-S", *options, "--chart=speed.png", "--out=speed.json", "--json"])
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert saved == printed | {"made_by": MARK}
    assert printed["rows"][0]["label"] == "DiC-S fp32 eager"
    assert Image.open(tmp_path / "speed.png").width > 500


def test_a_full_gpu_is_told_in_a_line(mistake, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("dic_repa.bench.model.bench_model", full)
    assert "take fewer or smaller models" in mistake("bench", "model", "DiC-S")


def test_mistakes(mistake, tmp_path):
    (tmp_path / "mine.py").write_text("class Plain: ...\n")
    assert "did you mean DiC-S" in mistake("bench", "model", "DiC-Z")
    assert "'bf15' is not one of 'fp32', 'tf32', 'bf16', 'fp16'" in mistake(
        "bench", "model", "DiC-S", "--precision=bf15"
    )
    assert "tf32 is a precision of NVIDIA GPUs" in mistake(
        "bench", "model", "DiC-S", "--precision=tf32", "--device=cpu"
    )
    assert "name it speed.webp.png" in mistake("bench", "model", "DiC-S", "--chart=speed.webp")
    assert "there is no device 'gpu' to measure" in mistake("bench", "model", "DiC-S", "--device=gpu")
    if not torch.cuda.is_available():
        assert "take --small" in mistake("bench", "paper")
    assert "takes whole numbers from 1, not 'one'" in mistake("bench", "model", "DiC-S", "--batch=one")
    assert "'reduce-overhed' is not one of 'off', 'blocks', 'default', 'reduce-overhead'" in mistake(
        "bench", "sample", "digits-urepa", "--compile=reduce-overhed"
    )
    assert "needs a GPU" in mistake("bench", "train", "digits-urepa", "--precision=fp16", "--device=cpu")
    with pytest.raises(UserError, match="no file nowhere"):
        load_factory("nowhere.py:Plain")
    with pytest.raises(UserError, match="did you mean Plain"):
        load_factory(f"{tmp_path / 'mine.py'}:Plan")


BASELINES = """
from torch import nn
from dic_repa.models import DiC

def small(**options) -> DiC: return DiC(8, (1, 1, 1, 1, 1), **options)

class TwoArguments(nn.Module):
    def __init__(self, denoiser, more): ...

class NoTime(nn.Module):
    def __init__(self, denoiser):
        super().__init__()
    def forward(self, x): return x

class Taller(nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser
    def forward(self, x, t, y): return self.denoiser(x, t, y).repeat(1, 1, 2, 1)

class Tuple(Taller):
    def forward(self, x, t, y): return x, y

def nothing(denoiser): ...
"""


def test_baseline_that_does_not_fit_is_told_in_a_line(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "baselines.py").write_text(BASELINES)
    (tmp_path / "broken.py").write_text("def plain(:")
    (tmp_path / "lacking.py").write_text("import no_such_module")

    def says(baseline):
        return mistake("bench", "model", "baselines:small", "--size=8", "--no-peak", f"--baseline={baseline}")

    assert "does not fit (TypeError: " in says("baselines.py:TwoArguments")
    assert "it is called with the denoiser, and returns" in says("baselines:TwoArguments")
    assert "takes 2 positional arguments but 4 were given" in says("baselines.py:NoTime")
    assert "does not fit (AttributeError: 'NoneType'" in says("baselines.py:nothing")
    assert "gives an output of shape (1, 4, 16, 8), the denoiser one of shape (1, 4, 8, 8)" in says("baselines:Taller")
    assert "gives tuple, the denoiser one of shape" in says("baselines.py:Tuple")
    assert "does not fit (SyntaxError: " in says("broken.py:plain")
    assert "does not fit (ModuleNotFoundError: No module named 'no_such_module'" in says("lacking:plain")
    assert "plugin 'nowhere' was not found" in says("nowhere:plain")
    assert "write FILE.py:FUNCTION" in says("baselines.py")
    assert "unknown name in --baseline DiC-S=a.py:A: 'DiC-S'; known: baselines:small" in says("DiC-S=a.py:A")
    train = ["bench", "train", "digits-urepa", "--batch=1", "--set=model.width=8"]
    assert "gives an output of shape (1, 1, 32, 16)" in mistake(*train, "--baseline=baselines.py:Taller")


def test_clocks_in_their_units_and_why_there_are_none(monkeypatch):
    gpu = torch.device("cuda", 0)
    for name, value in (("clock_rate", 1980), ("power_draw", 312_500), ("temperature", 41)):  # MHz, mW, degrees C
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert read_clocks(gpu) == {"clocks.sm": "1980 MHz", "power.draw": "312.50 W", "temperature.gpu": "41"}

    def no_driver(_device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", no_driver)
    assert read_clocks(gpu) == {"clocks": "unknown (nvidia-ml-py does not seem to be installed)"}


def test_power_is_sampled_in_watts(monkeypatch):
    draws = iter([100_000, 300_000])  # mW; then the driver tells no more
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _device: next(draws))
    before = set(threading.enumerate())
    with sampled_power(torch.device("cuda"), interval=0.001) as watts:
        for thread in set(threading.enumerate()) - before:
            thread.join()
    assert watts == [100, 300]
    with sampled_power(CPU) as watts:
        pass
    assert watts == []
