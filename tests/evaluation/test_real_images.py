"""Real images by name: as the reference, and as the bound that samples are compared with."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import timm
import torch
from conftest import TINY
from pictures import write_tree
from safetensors.torch import load
from small_runs import small_run

from dic_repa.cli import main
from dic_repa.data import datasets
from dic_repa.data.digits import load_digits, resize
from dic_repa.errors import UserError
from dic_repa.evaluation import Judge, Measure, frechet_distance, metrics, open_images, statistics
from dic_repa.evaluation.digits import Digits as DigitsNetwork
from dic_repa.evaluation.extractors import extractors
from dic_repa.evaluation.judge import notes_on_scores, real_images
from dic_repa.evaluation.report import read_run
from dic_repa.evaluation.runs import evaluate_run
from dic_repa.evaluation.tune import Tuner
from dic_repa.recipe import load_recipe
from dic_repa.runtime.table import number
from dic_repa.sampling.load import load as load_run
from dic_repa.trust import check_code


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIC_REPA_STATISTICS", str(tmp_path / "statistics"))


def levels(split: str, size: int = 16) -> torch.Tensor:
    """The digits of a split, uint8 (N, 3, size, size)."""
    return (resize(load_digits(split)[0], size) * 255).round().byte().expand(-1, 3, -1, -1)


def all_of(images) -> torch.Tensor:
    return next(images.batches([range(len(images))]))


@pytest.mark.parametrize(
    ("name", "split"), [("digits", "held-out"), ("digits:held-out", "held-out"), ("digits:train", "train")]
)
def test_a_data_set_and_its_split_are_named(name, split):
    found = open_images(name)
    assert found.source == name
    assert (all_of(found).int() - levels(split).int()).abs().max() <= 1  # by way of [-1, 1] and back


def test_a_path_of_that_name_comes_first(tmp_path):
    write_tree(tmp_path / "digits:train", {"cat": 3})
    assert len(open_images("digits:train")) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "there is no folder, zip or tar digit, and no such data set; did you mean digits"),
        ("digits:test", "unknown split 'test'"),
        ("prepared", "there is no folder, zip or tar prepared, and no such data set"),  # which needs a path
        ("data/digit", "there is no folder, zip or tar data/digit$"),
    ],
)
def test_what_is_no_such_data_set(name, message):
    with pytest.raises(UserError, match=message):
        open_images(name)


def test_a_data_set_of_one_size_is_cropped(monkeypatch):
    class Squares(torch.utils.data.Dataset):
        def __init__(self, split="train", size=12):
            if size != 12:
                raise UserError("squares are of 12 pixels")
            self.images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(-1, 3, 12, 12) * 40

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"image": self.images[index], "label": torch.tensor(0)}

    monkeypatch.setitem(datasets._entries, "squares", Squares)
    assert open_images("squares").size() == (12, 12)
    cropped = all_of(open_images("squares", resize=6))
    assert torch.equal(cropped, Squares().images[..., :6, :6])


def test_in_a_recipe_a_data_set_is_of_the_size_that_is_trained_on():
    recipe = load_recipe("digits-urepa", ["data.size=20"])
    assert torch.allclose(all_of(real_images(recipe, "digits:train")).int(), levels("train", 20).int(), atol=1)
    assert real_images(recipe, "elsewhere.npz") == "elsewhere.npz"


def test_named_images_are_measured_and_their_features_cached(monkeypatch):
    samples, network = levels("train")[:200], DigitsNetwork()
    features = [network(images)["features"] for images in (samples, levels("held-out"))]
    expected = frechet_distance(*statistics(features[0]), *statistics(features[1]))
    found = Measure(["fd-digits"], "digits:held-out")([samples])
    assert found.values["fd-digits"] == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr("dic_repa.evaluation.measuring.extract", lambda *a, **k: pytest.fail("it is cached"))
    Measure(["fd-digits"], "digits:held-out")


BOUND = "evaluate={metric: fd-digits, also: [prec-digits], reference: digits, bound: 'digits:train'}"
QUICK = ["sample.num=40", "sample.steps=1", "train.steps=2", "train.checkpoint_every=2", BOUND]


def real_score(count: int) -> float:
    """FD-digits of training digits, evenly chosen, against all that are held out."""
    chosen = levels("train")[[i * 8000 // count for i in range(count)]]
    features = [DigitsNetwork()(images)["features"] for images in (chosen, levels("held-out"))]
    return frechet_distance(*statistics(features[0]), *statistics(features[1]))


def test_the_bound_is_scored_as_the_samples_are_and_as_many_of_it():
    labels = load_digits("train")[1][:120]
    judge = Judge(["fd-digits", "recognised"], "digits", bound="digits:train")
    scores = judge(levels("train")[:120], labels)
    assert scores["reference"]["count"] == 120
    assert scores["reference"]["fd-digits"] == pytest.approx(real_score(120), rel=1e-3)
    assert scores["reference"]["recognised"] > 0.95  # by the labels of the real ones
    few = Measure(["fd-digits"], "digits", bound=open_images("digits:train").spread(50))([levels("train")[:120]])
    assert few.real.count == 50
    assert any(warning.startswith("the bound has 50 images, fewer than the 120") for warning in few.warnings)


def test_a_bound_that_does_not_fit_is_told_at_once(tmp_path, mistake):
    write_tree(tmp_path / "tree", {"cat": 3})
    with pytest.raises(UserError, match="the images of the bound tree are 50x40, the reference 16x16"):
        Measure(["fd-digits"], "digits", bound="tree")
    with pytest.raises(UserError, match="recognised: the images do not tell which class each should show"):
        Measure(["recognised"], bound="tree")
    assert "--bound goes with --reference" in mistake("evaluate", "run", "--bound", "digits")
    own = ["--set=train.steps=2", "--set=evaluate.bound=digits:train"]
    assert "digits has real images of its own" in mistake("train", "digits-baseline", *TINY, *own, "--out", "run")
    wrong = [
        "--out",
        "run",
        "--set=train.steps=2",
        "--set=evaluate={metric: fd-digits, reference: digits, bound: digit}",
    ]
    said = mistake("train", "digits-baseline", *TINY, *wrong)
    assert "there is no bound digit to compare samples with, and no such data set; did you mean digits" in said


def test_a_run_is_measured_by_its_data_at_its_size(tmp_path, monkeypatch):
    """Not with the data set's own 16 pixels, also where a command names it."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small_run(tmp_path / "run", *QUICK, "data.size=20", "evaluate=null", "sample.num=4")
    options = ["--reference", "digits", "--bound", "digits:train", "--metrics", "fd-digits", "--out", "record.json"]
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "run", *options])
    assert exit.value.code == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["reference"]["size"] == record["samples"]["size"] == [20, 20]


def test_real_images_are_shown_beside_the_samples_by_every_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    expected = pytest.approx(real_score(40), rel=1e-3)
    run = small_run(tmp_path / "run", *QUICK, "evaluate.every=1", "evaluate.num=40", "train.label_dropout=0.1")

    def call(*arguments) -> list[str]:
        with pytest.raises(SystemExit) as exit:
            main([*map(str, arguments)])
        shown = capsys.readouterr()
        assert exit.value.code == 0, shown.err
        return shown.out.splitlines()

    judged = [e for e in read_run(run)["evaluations"] if e["step"] == 1]  # in training
    assert judged[0]["reference"]["fd-digits"] == expected
    row = next(line for line in call("evaluate", "run") if line.startswith("real digits:train")).split()
    assert row[2] == "40"
    assert float(row[3]) == expected
    options = ["--reference", "digits", "--bound", "digits:train", "--metrics", "fd-digits-infinity,fd-digits"]
    row = next(line for line in call("evaluate", "run", *options) if line.startswith("real digits:train")).split()
    assert (row[2], float(row[4])) == ("40", expected)
    (file,) = (run.path / "evaluation").glob("*/metrics.json")
    bound = json.loads(file.read_text())["bound"]
    assert (bound["path"], bound["count"], bound["metrics"]["fd-digits"]) == ("digits:train", 40, expected)
    measured = next(e for e in read_run(run)["evaluations"] if "fd-digits-infinity" in e["scores"])
    assert measured["reference"]["fd-digits-infinity"] == bound["metrics"]["fd-digits-infinity"]
    cells = ["--scales", "1,2", "--intervals", "0:1", "--num", "40", "--confirm", "0"]
    said = next(line for line in call("tune", "run", *cells) if line.startswith("real digits:train"))
    assert said == f"real digits:train: FD-digits {number(bound['metrics']['fd-digits'])} with 40 images"


def test_a_named_data_set_in_a_run_is_no_code(tmp_path, monkeypatch):
    """Nothing is imported by such a name, which looks like `package.module:factory`."""
    check_code({"evaluate": {"reference": "digits:train", "bound": "evil:go"}}, "recipe.yaml")
    with pytest.raises(UserError, match=r"evaluate\.metric evil:go"):
        check_code({"evaluate": {"metric": "evil:go"}}, "recipe.yaml")
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="there is no folder, zip or tar evil:go"):
        open_images("evil:go")


def test_another_bound_judges_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = small_run(tmp_path / "run", *QUICK)
    first = evaluate_run(run.path).scores
    text = run.recipe_file.read_text()
    run.recipe_file.write_text(text.replace("digits:train", "digits:held-out"))
    second = evaluate_run(run.path).scores
    assert second["fd-digits"] == first["fd-digits"]
    assert second["reference"]["fd-digits"] != first["reference"]["fd-digits"]


def test_lite2_is_the_mean_of_what_timm_gives_at_128_pixels():
    extractor = extractors.create("lite2")
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = timm.create_model("tf_efficientnet_lite2", features_only=True, out_indices=(3,)).eval()
    weights = resources.files("dic_repa.encoders").joinpath("weights/efficientnet_lite2.safetensors")
    model.load_state_dict({k: v.float() for k, v in load(weights.read_bytes()).items()}, strict=False)
    large = torch.nn.functional.interpolate(images.float() / 255, (128, 128), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        (expected,) = model(large * 2 - 1)
    assert expected.shape == (3, 120, 8, 8)
    torch.testing.assert_close(extractor(images)["pooled"], expected.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)


def test_scores_by_lite2_are_said_to_be_no_fid(tmp_path, capsys):
    write_tree(tmp_path / "tree", {"cat": 5})
    with pytest.raises(SystemExit) as exit:
        main(
            ["evaluate", "tree", "--reference", "tree", "--metrics", "fd-lite2,prec-lite2,recall-lite2", "--resize=32"]
        )
    assert exit.value.code == 0
    shown = capsys.readouterr()
    heading, row, *_ = shown.out.splitlines()
    assert "FD-lite2  precision (lite2)  recall (lite2)" in heading
    assert row.split()[-2:] == ["1.00", "1.00"]
    assert "note: scores by the tokens of efficientnet-lite2 are no FID" in shown.out + shown.err
    assert metrics.create("fd-lite2").describe()["hint"] == "lower is better; no FID"


def test_guidance_is_searched_by_lite2(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name, split in (("train", "train"), ("held-out", "held-out")):
        np.savez(tmp_path / f"{name}.npz", levels(split)[:12].movedim(1, -1).numpy())
    section = "evaluate={metric: fd-lite2, reference: train.npz, bound: held-out.npz}"
    run = small_run(tmp_path / "run", *QUICK, section)
    tuner = Tuner(load_run(run.path), scales=[1, 2], intervals=[(0, 1)], num=4, confirm=0, out=tmp_path / "tune")
    cells = tuner.run()
    assert sorted(cell.value for cell in cells) == [cell.value for cell in cells]
    real = Measure(["fd-lite2"], "train.npz")(open_images("held-out.npz").spread(4)).values["fd-lite2"]
    assert tuner.real == {"count": 4, "fd-lite2": pytest.approx(real, rel=1e-4)}
    assert (tmp_path / "tune/tune.png").is_file()


def test_a_run_that_lite2_taught_is_said_to_be_judged_by_its_teacher():
    taught = load_recipe("digits-urepa", ["alignments.0.encoder=efficientnet-lite2", "alignments.0.encoder_options={}"])
    other = load_recipe("digits-urepa")
    assert [note for note in notes_on_scores(["fd-lite2"], taught) if "judged by its own teacher" in note]
    assert len(notes_on_scores(["fd-lite2"], other)) == 1
    assert notes_on_scores(["fd-digits"], taught) == []
