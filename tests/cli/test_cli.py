"""Every verb as a user runs it: what it writes, what it prints, and its answer to mistakes."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

from dic_repa.cli import VERBS
from dic_repa.files.pictures import load_png
from dic_repa.recipe import list_recipes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps, judged at its end; with the command's output."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, "-m", "dic_repa", "train", "digits-urepa", *TINY, "--set=train.steps=4"]
    # Averaged without warm-up the weights are nearly the initial ones, which predict nothing, as one test asks for.
    command += ["--set=train.sample_every=4", "--set=train.ema_warmup=false"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "digits-urepa", done.stdout


def test_train_samples_and_judges(run):
    folder, output = run
    assert "recognised" in output
    assert "FD-digits" in output
    record = json.loads(next((folder / "evaluation").glob("*.json")).read_text())
    assert record["scores"]["count"] == 20
    assert 0 <= record["scores"]["recognised"] <= 1
    assert record["scores"]["fd-digits"] > 0
    with Image.open(folder / "samples/step_00000004.png") as grid:
        assert min(grid.size) > 100


@pytest.mark.slow
def test_sample_is_the_same_whatever_the_batch_size(run, here, tmp_path):
    folder, _ = run
    for solver in ("heun", "euler_maruyama"):
        options = ["--num", "7", "--solver", solver, "--steps", "3", "--scale", "2", "--classes", "1,3-4"]
        for size in ("7", "2"):
            here("sample", folder, "--out", f"{solver}-{size}", "--batch-size", size, *options)
        for i in range(7):
            one, other = (load_png(tmp_path / f"{solver}-{size}" / f"{i:06d}.png") for size in ("7", "2"))
            assert (one - other).abs().max() <= 1.01 / 255  # a rounding may fall either way
        record = json.loads((tmp_path / f"{solver}-7/samples.json").read_text())
        assert record["labels"] == [1, 3, 4, 1, 3, 4, 1]
        assert (tmp_path / f"{solver}-7/grid.png").exists()


@pytest.mark.slow
def test_a_model_without_labels_is_sampled_without(run, here, tmp_path):
    shutil.copytree(run[0] / "checkpoints/step_00000004/ema", tmp_path / "unlabelled")
    recipe = tmp_path / "unlabelled/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("label_dropout: 0.1", "label_dropout: 1.0"))
    here("sample", "unlabelled", "--num", "2", "--steps", "1", "--out", "out")
    assert json.loads((tmp_path / "out/samples.json").read_text())["labels"] == [10, 10]


@pytest.mark.slow
def test_overwriting_leaves_no_image_of_before(run, here, tmp_path):
    here("sample", run[0], "--num", "4", "--steps", "1", "--out", "out")
    here("sample", run[0], "--num", "2", "--steps", "3", "--out", "out", "--overwrite", "--trajectory")
    assert [p.name for p in sorted((tmp_path / "out").glob("0*.png"))] == ["000000.png", "000001.png"]
    with Image.open(tmp_path / "out/trajectory.png") as picture:
        assert picture.width > picture.height


@pytest.mark.slow
def test_sample_with_a_sampling_recipe(run, here, tmp_path):
    here("sample", run[0], "--recipe", "digits-cfg", "--num", "3", "--out", "out")
    assert json.loads((tmp_path / "out/samples.json").read_text())["sample"]["guidance"]["scale"] == 1.8


@pytest.mark.slow
def test_sample_takes_an_inference_checkpoint(run, dic_repa, tmp_path):
    dic_repa("sample", run[0] / "checkpoints/step_00000004/ema", "--num", "2", "--out", "out")
    assert load_png(tmp_path / "out/000001.png").shape == (1, 16, 16)


@pytest.mark.slow
def test_evaluate_several_runs_and_reads_what_is_known(run, dic_repa, here, tmp_path):
    folder, first = run
    other = ["--out", "other", *TINY, "--set=train.steps=4", "--set=train.sample_every=4", "--set=train.seed=1"]
    other += ["--set=train.ema_warmup=false"]  # in all but the seed as `run`
    here("train", "digits-urepa", *other)
    lines = dic_repa("evaluate", folder, "other", folder).stdout.splitlines()
    row = next(line for line in first.splitlines() if "heun" in line)
    rows = [line for line in lines if line.startswith(str(folder))]
    assert [line.split()[-1] for line in rows] == [row.split()[-1]] * 2  # the score of the run's end, not a new one
    scores = [
        json.loads(next((f / "evaluation").glob("*.json")).read_text())["scores"] for f in (folder, tmp_path / "other")
    ]
    values = [score["fd-digits"] for score in scores]
    spread = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    (summary,) = [line for line in lines if "(2 seeds)" in line]
    assert summary.endswith(spread)
    guided = here("evaluate", folder, "--recipe", "digits-cfg", "--num", "12", "--both").splitlines()[1:3]
    assert all("cfg 1.8" in row for row in guided)
    assert [row.split()[-3] for row in guided] == ["balanced", "random"]


@pytest.mark.slow
def test_info_prints_the_table(here):
    lines = here("info", "DiC-XL", "DiC-S").splitlines()
    assert lines[1].split() == ["DiC-XL", "32x32", "702.27", "116.10", "57.2"]
    assert lines[2].split() == ["DiC-XL", "64x64", "702.27", "464.12", "228.7"]
    assert lines[3].split()[:4] == ["DiC-S", "32x32", "32.84", "5.87"]
    row = json.loads(here("info", "digits-urepa", "--json"))[0]
    assert row["size"] == 16
    assert row["parameters"] > 1e5


def test_recipes_lists_and_shows(dic_repa, here, tmp_path):
    listing = dic_repa("recipes").stdout.splitlines()
    assert sorted(line.split()[0] for line in listing if line.startswith("  ")) == list(list_recipes())
    shown = here("recipes", "show", "digits-urepa", "--set", "train.steps=7")
    (tmp_path / "mine.yaml").write_text(shown)
    assert here("recipes", "show", "mine.yaml") == shown
    assert "steps: 7" in shown


def test_help_imports_no_torch():
    script = """if True:
        import sys
        from dic_repa.cli import main
        for verb in ([], *([verb] for verb in sys.argv[1:])):
            try:
                main([*verb, "--help"])
            except SystemExit as end:
                assert not end.code, verb
            assert "torch" not in sys.modules, verb
    """
    done = subprocess.run([sys.executable, "-c", script, *VERBS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Examples:") == 1 + len(VERBS)


@pytest.mark.slow
def test_mistakes_in_commands(mistake):
    assert "unknown verb 'trian'; did you mean train?" in mistake("trian")
    assert "did you mean digits-urepa" in mistake("train", "digits-urep")
    assert "No such option" in mistake("train", "digits-urepa", "--rune", "x")
    assert "is a sampling recipe" in mistake("train", "digits-cfg")
    assert "did you mean DiC-XL" in mistake("train", "digits-urepa", "--set=model.name=DiC-LX")
    assert "unknown encoder 'digit-vit'; did you mean digits-vit" in mistake(
        "train", "digits-urepa", "--set=alignments.0.encoder=digit-vit"
    )
    assert "unknown head 'mpl'; did you mean mlp" in mistake("train", "digits-urepa", "--set=alignments.0.head=mpl")
    assert "unknown tap 'mid.9'" in mistake("train", "digits-urepa", "--set=alignments.0.tap=mid.9")
    assert "unknown objective" in mistake("train", "digits-urepa", "--set=objective.name=flow")
    message = "unknown option of objective 'flow-matching': 'pth'; did you mean path?"
    assert message in mistake("train", "digits-urepa", "--set=objective.options={pth: linear}")
    assert "unknown interpolant" in mistake("train", "digits-urepa", "--set=objective.options={path: liner}")
    assert "unknown data set 'digit'; did you mean digits" in mistake("train", "digits-urepa", "--set=data.name=digit")
    assert "divisible by 4, not 18x18" in mistake("train", "digits-urepa", "--set=data.size=18")
    assert "divisible by 4, not 18x18" in mistake("train", "digits-baseline", "--set=data.size=18")
    # What only the end of the run would need is looked at before its beginning.
    assert "did you mean heun" in mistake("train", "digits-urepa", "--set=sample.solver=huen")
    assert "did you mean cosine" in mistake("train", "digits-urepa", "--set=sample.guidance.schedule=cosin")
    assert "unknown metric 'digit'" in mistake("train", "digits-urepa", "--set=evaluate.metric=digit")
    assert "train.precision fp16" in mistake("train", "digits-urepa", "--set=train.precision=fp16")
    assert not Path("runs").exists()
    assert "plugin 'nowhere' was not found" in mistake("train", "digits-urepa", "--set=plugins=[nowhere]")
    assert "there is no run at" in mistake("train", "digits-urepa", "--resume")
    assert "exclude each other" in mistake("train", "digits-urepa", "--resume", "--overwrite")
    assert "there is no run or checkpoint folder" in mistake("sample", "nowhere")
    assert "is not a run" in mistake("evaluate", ".")
    assert "DiC-XL" in mistake("info", "DiC-XM")


def test_mistakes_with_a_run(run, mistake, dic_repa, tmp_path):
    folder, _ = run
    assert "pass --resume to go on with it, or --overwrite" in mistake("train", "digits-urepa", "--out", folder)
    assert "these keys differ: model.width" in mistake(
        "train", folder / "recipe.yaml", "--out", folder, "--resume", "--set=model.width=16"
    )
    assert "did you mean heun" in mistake("sample", folder, "--solver", "huen")
    assert "give rtol and atol instead of a step count" in mistake(
        "sample", folder, "--solver", "dopri5", "--steps", "9"
    )
    assert "sample.rtol should be greater than 0" in mistake("sample", folder, "--solver", "dopri5", "--rtol", "0")
    assert "'diffusion' is for SDE solvers" in mistake("sample", folder, "--diffusion", "sigma")
    assert "did you mean sigma" in mistake("sample", folder, "--solver", "ou", "--diffusion", "sgima")
    assert "did you mean karras" in mistake("sample", folder, "--grid", "karas")
    assert "sample.guidance.interval.1 should be less than or equal to 1" in mistake(
        "sample", folder, "--interval", "0", "2"
    )
    assert "needs a model trained with the objective ddpm" in mistake("sample", folder, "--solver", "ddim")
    assert "with scale 3.0: give a scale between 0 and 1" in mistake("sample", folder, "--cfgpp", "--scale", "3")
    assert "'--steps': takes whole numbers from 1, not '0'" in mistake("sample", folder, "--steps", "0")
    assert "interval must rise" in mistake("sample", folder, "--interval", "0.7", "0.2")
    assert "the model has the classes 0 to 9" in mistake("sample", folder, "--classes", "10")
    assert "--classes takes numbers" in mistake("sample", folder, "--classes", "5-2")
    assert "--grid takes a name" in mistake("sample", folder, "--grid", "shifted:shift=abc")
    assert "unknown option of time grid 'shifted': 'foo'" in mistake("sample", folder, "--grid", "shifted:foo=3")
    assert "'--evaluations': takes whole numbers" in mistake("solvers", "compare", folder, "--evaluations", "a,b")
    assert "more than train.steps 2" in mistake(
        "train", folder / "recipe.yaml", "--out", folder, "--resume", "--set=train.steps=2"
    )
    assert "--classes takes numbers" in mistake("sample", folder, "--classes", "three")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("mine")
    assert "is not a run, so it is not overwritten" in mistake(
        "train", "digits-urepa", "--out", "precious", "--overwrite"
    )
    assert (tmp_path / "precious/file").read_text() == "mine"
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "recipe.yaml", "model.safetensors"):
        source = folder / "checkpoints/step_00000004/ema" / name
        (half / name).write_bytes(source.read_bytes()[: 5000 if name.endswith("tensors") else None])
    assert "not a whole safetensors file" in mistake("sample", "half")


def test_debug_shows_the_traceback(dic_repa):
    done = dic_repa("recipes", "show", "nothing", "--debug", check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_checkpoint_of_another_model_says_which_shapes_differ(run, mistake, tmp_path):
    folder = run[0] / "checkpoints/step_00000004/ema"
    (tmp_path / "other").mkdir()
    for name in ("recipe.yaml", "model.safetensors"):
        (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"width": 12}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert "stem.weight is (8, 1, 3, 3), the model's (12, 1, 3, 3)" in mistake("sample", "other")


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(run, dic_repa, here, tmp_path):
    options = ["--num", "5", "--solver", "euler_maruyama", "--steps", "3", "--scale", "1.5"]
    here("sample", run[0], "--out", "one", *options)
    dic_repa("sample", run[0], "--out", "two", *options, processes=2)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    for i in range(5):
        one, two = (load_png(tmp_path / name / f"{i:06d}.png") for name in ("one", "two"))
        assert (one - two).abs().max() <= 1.01 / 255
    assert (tmp_path / "one/samples.json").read_text() == (tmp_path / "two/samples.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--solver", "dopri5", "--rtol", "1e-1", "--atol", "1e-1", "--scale", "2"],
        ["--solver", "dpmpp-2m", "--steps", "4", "--grid", "shifted:shift=2", "--scale", "2", "--schedule", "cosine"],
        ["--solver", "ou", "--steps", "4", "--diffusion", "sigma", "--last-step", "tweedie", "--last-step-size", "0.1"],
        ["--solver", "euler", "--steps", "3", "--cfgpp", "--scale", "0.6", "--interval", "0", "1"],
        ["--solver", "ab2", "--grid", "1,0.6,0.2,0"],
        ["--solver", "rk4", "--steps", "2", "--scale", "3", "--rescale", "0.7", "--channels", "1"],
    ],
    ids=lambda options: options[1],
)
@pytest.mark.filterwarnings("error:std")
def test_sample_offers_what_the_library_has(run, here, tmp_path, options):
    here("sample", run[0], "--num", "3", "--out", "out", *options)
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert record["sample"]["solver"] == options[1]
    assert record["evaluations_per_image"] >= 2


@pytest.mark.slow
def test_autoguidance_by_a_weaker_model(run, here, tmp_path):
    def images(out, *options):
        here("sample", run[0], "--out", out, "--num", "2", "--steps", "2", *options)
        return torch.stack([load_png(tmp_path / out / f"{i:06d}.png") for i in range(2)])

    weak = shutil.copytree(run[0] / "checkpoints/step_00000004/ema", tmp_path / "weak") / "model.safetensors"
    weights = load_file(weak)
    weights["output.conv2.bias"] += 0.2
    save_file(weights, weak)
    guidance = ["--scale", "2", "--interval", "0", "1"]
    plain = images("plain")
    # Away from itself is nowhere: guidance by the same model leaves the samples as they are, another model moves them:
    # v + (v - (v + 0.2)) at scale 2 ends 0.2 higher, a tenth of the range from -1 to 1.
    assert (images("self", "--weak", run[0], *guidance) - plain).abs().max() <= 1.01 / 255
    moved = images("away", "--weak", "weak", *guidance) - plain
    inside = (plain > 0.05) & (plain < 0.85)
    torch.testing.assert_close(moved[inside], torch.full_like(moved[inside], 0.1), rtol=0, atol=0.02)


def test_guidance_needs_a_trained_null_class(run, mistake, tmp_path):
    folder = tmp_path / "never-dropped"
    folder.mkdir()
    for file in (run[0] / "checkpoints/step_00000004/ema").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("label_dropout: 0.1", "label_dropout: 0.0"))
    assert "no null class to guide with" in mistake("sample", folder, "--scale", "2")


@pytest.mark.slow
def test_ddpm_recipe_trains_and_samples(here, tmp_path):
    here("train", "digits-ddpm", *TINY, "--set=train.steps=2", "--set=sample.steps=4", "--set=sample.num=10")
    for solver in ("ddim", "heun"):
        here("sample", "runs/digits-ddpm", "--solver", solver, "--steps", "3", "--num", "2", "--out", solver)
        assert load_png(tmp_path / solver / "000001.png").shape == (1, 16, 16)


@pytest.mark.slow
def test_solvers_lists_and_compares(run, here, tmp_path):
    lines = here("solvers").splitlines()
    heun = next(line.split() for line in lines if line.startswith("heun "))
    assert heun[1:5] == ["ode", "2", "2", "no"]
    assert next(line.split() for line in lines if line.startswith("dopri5 "))[3] == "auto"
    arguments = ["--solvers", "euler,heun", "--evaluations", "1,4", "--num", "10", "--out", "plot.png"]
    rows = here("solvers", "compare", run[0], *arguments).splitlines()
    assert [row.split()[:2] for row in rows[:3]] == [["euler", "1"], ["euler", "4"], ["heun", "3"]]
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.gpu
def test_train_in_half_precision_on_a_gpu(dic_repa, tmp_path):
    options = [*TINY, "--set=train.steps=4", "--set=train.precision=bf16", "--set=evaluate=null"]
    dic_repa("train", "digits-urepa", "--out", "half", *options, env={"ACCELERATE_USE_CPU": "false"})
    lines = (tmp_path / "half/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all(torch.isfinite(torch.tensor(json.loads(line)["loss"])) for line in lines)
