"""The best `train.micro_batch`: by laws of memory that are known, and by steps whose passes are counted."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from small_runs import small_recipe

from dic_repa.errors import UserError
from dic_repa.models import DiC
from dic_repa.training import dry_run_steps
from dic_repa.training.dry_run import dry_run, measurable, with_random_data
from dic_repa.training.micro_batch import USED, advice, largest_fitting

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Law:
    """Memory that `bytes_of` a pass's rows says, of a device of 80; beyond that torch raises. `asked` are the rows."""

    def __init__(self, bytes_of):
        self.bytes_of, self.asked = bytes_of, []

    def __call__(self, rows: int) -> float:
        self.asked.append(rows)
        if self.bytes_of(rows) > 80:
            raise torch.OutOfMemoryError(FULL)
        return self.bytes_of(rows)

    def best(self, share: int) -> int | None:
        fitting = [n for n in range(1, share + 1) if share % n == 0 and self.bytes_of(n) <= USED * 80]
        return max(fitting, default=None)


@pytest.mark.parametrize("share", [1, 12, 31, 256])
@pytest.mark.parametrize("each", [0.01, 0.25, 0.6, 5.0, 30.0, 90.0])
def test_of_a_straight_line_it_is_the_largest_divisor_that_fits(share, each):
    law = Law(lambda rows: 20 + each * rows)
    found = largest_fitting(share, 80, law)
    assert (found and found[0]) == law.best(share)
    assert found is None or found[1] == law.bytes_of(found[0])
    assert len(law.asked) == len(set(law.asked)) <= 5


def test_what_is_foretold_is_run_before_it_is_named():
    """Memory that bends upwards is foretold too low: what then does not fit is stepped down from."""
    law = Law(lambda rows: 20 + 0.1 * rows + rows**2 / 500)
    assert largest_fitting(256, 80, law)[0] == law.best(256) == 128
    assert law.asked == [4, 8, 256, 128]
    law = Law(lambda rows: 20 + 0.25 * rows)
    assert largest_fitting(256, 80, law) == (128, 52)
    assert law.asked == [4, 8, 128]  # 256 is not tried
    law = Law(lambda _rows: 75)
    assert largest_fitting(256, 80, law) is None  # the memory that must stay free


def test_other_errors_are_not_taken_for_a_full_memory():
    def fail(_rows):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        largest_fitting(8, 80, fail)


def test_advice():
    found = {"rows": 128, "peak": 61 * 2**30, "total": 80 * 2**30}
    fits = "128 fits (61.0 of 80.0 GiB); the recipe has"
    assert advice(found, 32, False) == f"{fits} 32: --set train.micro_batch=128"
    assert advice(found, 128, False) == f"{fits} 128, too"
    none = {"rows": None, "peak": None, "total": 80 * 2**30}
    assert advice(none, 32, False) == "not even 1 fits: --set train.gradient_checkpointing=true"
    assert "larger GPU" in advice(none, 32, True)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GiB, of which a pass takes `each` GiB a row: the passes that have run, as their number and rows."""
    passes, state = [], {}

    class Step(dry_run_steps.TrainingStep):
        def __call__(self, batch, step, *clock):
            rows = len(batch["x"]) // self.passes
            passes.append((self.passes, rows))
            if rows * state["each"] > 80:
                raise torch.OutOfMemoryError(FULL)
            return super().__call__(batch, step) if state["runs"] else torch.zeros(())

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for module in ("dry_run_steps", "micro_batch"):
        monkeypatch.setattr(f"dic_repa.training.{module}.TrainingStep", Step)
    monkeypatch.setattr("gc.collect", lambda: None)  # which takes its time in a process of many tests
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: int(passes[-1][1] * state["each"] * 2**30))

    def measure(each: float, *overrides: str, processes: int = 1, runs: bool = False) -> dict:
        state.update(each=each, runs=runs)
        recipe = small_recipe("train.batch_size=12", "data.workers=0", *overrides)
        trial = with_random_data(recipe, [])
        return dry_run_steps.measure(trial, Accelerator(cpu=True), recipe.train, processes, search=True)

    return measure, passes


def test_the_dry_run_tells_it_from_steps_of_at_most_two_passes(gpu):
    measure, passes = gpu
    report = measure(10.0, "train.micro_batch=3", runs=True)
    assert passes[:3] == [(4, 3)] * 3  # the recipe's own
    assert passes[3:] == [(2, 4)] * 2 + [(2, 6)] * 2  # 12 is foretold not to fit
    found = {"recipe": 3, "rows": 6, "peak": 60 * 2**30, "total": 80 * 2**30}
    assert report["micro_batch"] == found | {"advice": advice(found, 3, False)}
    assert measure(0.5)["micro_batch"]["rows"] == 12
    assert passes[-1] == (1, 12)


def test_of_several_processes_the_buffers_of_gradients_count(gpu):
    measure, _ = gpu
    one, four = (measure(1.0, processes=processes)["micro_batch"]["peak"] for processes in (1, 4))
    denoiser = DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10)
    assert four - one == 4 * sum(parameter.numel() for parameter in denoiser.parameters())


@pytest.mark.parametrize(
    ("each", "says"),
    [
        (
            20.0,
            r"does not fit .* \(CUDA out of memory\); micro_batch: 3 fits \(60.0 of 80.0 GiB\); the recipe has 12: ",
        ),
        (math.inf, "; micro_batch: not even 1 fits: --set train.gradient_checkpointing=true"),
    ],
)
def test_a_recipe_that_does_not_fit_is_told_what_does(gpu, each, says):
    measure, _ = gpu
    with pytest.raises(UserError, match=says):
        measure(each)


def test_it_is_not_looked_for_where_it_would_be_wrong():
    assert measurable(small_recipe(), 4)
    assert not measurable(small_recipe("train.sharding=fsdp2"), 4)
    assert measurable(small_recipe("train.sharding=fsdp2"), 1)
    assert not measurable(small_recipe("latent.end_to_end={}"), 1)
    assert not measurable(small_recipe("train.compile=reduce-overhead"), 1)


@pytest.mark.gpu
def test_a_gpu_has_room_for_a_small_run(tmp_path):
    report = dry_run(small_recipe("train.batch_size=64", "train.micro_batch=4"), tmp_path / "run")
    assert report["micro_batch"]["rows"] == 64
    assert report["micro_batch"]["peak"] < 0.2 * report["micro_batch"]["total"]
