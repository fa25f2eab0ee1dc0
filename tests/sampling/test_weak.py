"""Guidance by what the run itself has: its middle head, and its earlier checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_runs import metrics, small_run

from dic_repa.errors import UserError
from dic_repa.evaluation.report import _tuning
from dic_repa.evaluation.tune import Tuner
from dic_repa.objectives import FlowMatching
from dic_repa.recipe import GuidanceSection
from dic_repa.runs.folder import RunFolder
from dic_repa.samplers import initial_noise
from dic_repa.sampling import override_sampling
from dic_repa.sampling.load import load
from dic_repa.sampling.weights import find_weak, weak_weights

OPTIONS = ("train.steps=9", "train.keep_checkpoints=1", "train.keep_every=4", "train.more_ema_decays=[0.5]")
INTERNAL = ("model.options.middle_head=mid.0", "train.label_dropout=0", "sample.steps=2", "evaluate={metric: digits}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without a null class, with a middle head, and the checkpoints of the steps 4, 8 and 9."""
    return small_run(tmp_path_factory.mktemp("runs") / "run", *OPTIONS, *INTERNAL)


@pytest.fixture(scope="module")
def model(run):
    return load(run)


def velocities(model, x, t):
    """The velocity, and the middle head's, of the averaged weights, by the denoiser itself."""
    y = torch.zeros(len(x), dtype=torch.int64)
    return model.denoiser(x, torch.full((len(x),), t), y).chunk(2, dim=1)


def one_step(model, guidance):
    """One step of Euler from the noise of seed 0, of one image, and what it costs."""
    settings = override_sampling(model.recipe.sample, guidance, solver="euler", steps=1, num=1)
    sampler = model.sampler(settings)
    (x,) = sampler.solved(torch.zeros(1, dtype=torch.int64))
    return x, sampler.evaluations


def test_a_middle_head_is_trained_and_guides_in_one_evaluation(run, model):
    assert all(line["middle"] > 0 for line in metrics(run))
    noise = initial_noise((1, 16, 16), 0, [0])
    with torch.no_grad():
        v, middle = velocities(model, noise, 1.0)
        assert not torch.allclose(v, middle)
        for scale in (1.0, 1.4):
            x, evaluations = one_step(model, {"internal": scale})
            torch.testing.assert_close(x, noise - (middle + scale * (v - middle)))
            assert evaluations == 1


def test_a_weaker_model_of_the_same_run_is_found_by_one_option(run, model):
    """An earlier checkpoint, another average, and a run beside this one by its name."""
    shutil.copytree(run.checkpoint_path(4) / "ema", run.path.parent / "smaller")
    places = {"earlier": 4, "0.9": 8, 0.1: 4, "step_00000008": 8}
    folders = {str(weak): run.checkpoint_path(step) for weak, step in places.items()}
    folders |= {"ema-0.5": run.checkpoint_path(9) / "ema-0.5", "smaller": run.path.parent / "smaller"}
    for weak, folder in folders.items():
        settings = override_sampling(model.recipe.sample, {"scale": 2.0, "weak": weak})
        assert find_weak(settings.guidance.weak, model.source) == folder
        given = override_sampling(model.recipe.sample, {"scale": 2.0, "weak": str(folder)})
        assert weak_weights(settings, model.source) == weak_weights(given, model.source) != {}
    noise = initial_noise((1, 16, 16), 0, [0])
    with torch.no_grad():
        v, u = velocities(model, noise, 1.0)[0], velocities(load(folders["earlier"]), noise, 1.0)[0]
        x, evaluations = one_step(model, {"scale": 2.0, "interval": [0.0, 1.0], "weak": "earlier"})
    assert not torch.allclose(u, v)
    torch.testing.assert_close(x, noise - (u + 2 * (v - u)))
    assert evaluations == 2


def test_mistakes_are_told(run, model, tmp_path):
    for weak, message in (
        ("step_00000005", r"has no whole step_00000005 beside it; train with train.keep_every"),
        ("ema-0.9", "has no weights 'ema-0.9'; did you mean ema-0.5"),
        ("nowhere", "there is no run or checkpoint folder nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            one_step(model, {"scale": 2.0, "weak": weak})
    with pytest.raises(UserError, match="has no whole checkpoint before step_00000004"):
        one_step(load(run.checkpoint_path(4)), {"scale": 2.0, "weak": "earlier"})
    alone = load(shutil.copytree(run.checkpoint_path(9) / "ema", tmp_path / "alone"))
    with pytest.raises(UserError, match=r"alone is in no run's folder; name a run or checkpoint"):
        one_step(alone, {"scale": 2.0, "weak": "earlier"})
    alone.denoiser.middle_head = None
    with pytest.raises(UserError, match="has no middle head to guide with"):
        one_step(alone, {"internal": 1.4})
    assert FlowMatching().velocity_model(alone.denoiser).with_middle is None


def test_each_guidance_of_a_run_without_a_null_class_is_tuned(model, tmp_path):
    given = {"scales": (1.0, 1.4), "intervals": ((0.0, 1.0),), "num": 20, "confirm": 0}
    with pytest.raises(UserError, match="--search internal, or --weak"):
        Tuner(model, search="guidance")
    weak = model.recipe.sample.model_copy(update={"guidance": GuidanceSection(scale=1.0, weak="earlier")})
    fixed = weak.model_copy(update={"guidance": GuidanceSection(scale=1.5, interval=(0.0, 0.5), weak="earlier")})
    cells = []
    for sample, search, found in ((None, None, "internal"), (weak, None, "guidance"), (fixed, "internal", "internal")):
        tuner = Tuner(model, sample=sample, search=search, out=tmp_path / "tune", **given)
        tuner.run()
        assert tuner.search == found
        cells.append([cell.value for cell in tuner.found])
        kept = [entry["sample"]["guidance"] for entry in json.loads(tuner.file.read_text())["cells"]]
    assert [cell.options for cell in tuner.found] == ["--internal 1", "--internal 1.4 --internal-interval 0 1"]
    keys = [each and (each["scale"], each["weak"], each["internal"]) for each in kept]
    assert keys == [None, (1.0, None, 1.4), None, (1.4, "earlier", 1.0), (1.5, "earlier", 1.0), (1.5, "earlier", 1.4)]
    assert len({value for values in cells for value in values}) == 5  # without any guidance they agree
    shown = _tuning(RunFolder(tmp_path), [])
    found = [shown[key] for key in ("title", "scales", "values")]
    assert found == ["scale of internal guidance", [1, 1.4], [cells[-1]]]
