"""Conditions other than classes: what stands for none, and runs that are trained, guided and sampled by them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture
from safetensors.torch import load_file
from torch import nn

from dic_repa.cli import main
from dic_repa.conditions import (
    ClassLabels,
    NoCondition,
    TokenCondition,
    VectorCondition,
    condition_of_data,
    create_condition,
    null_of,
    read_examples,
)
from dic_repa.data.random_data import RandomData
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError
from dic_repa.files.pictures import load_png
from dic_repa.interpolants import LinearPath
from dic_repa.models import DiC, Pretrained, create_denoiser
from dic_repa.objectives import FlowMatching
from dic_repa.recipe import SampleSection
from dic_repa.samplers import Guidance, initial_noise
from dic_repa.sampling.load import load
from dic_repa.sampling.sampler import Sampler

MASK = torch.tensor([True, False])
SLOPE, STD, SPREAD = torch.tensor([0.7, -0.4], dtype=torch.float64), 0.3, 0.5
PLUGIN = '''
import torch
from torch import nn
from dic_repa.conditions import TokenCondition, VectorCondition
from dic_repa.data import register_dataset
from dic_repa.models import Pretrained


class Levels(torch.utils.data.Dataset):
    """Pictures of one grey, the mean of the numbers that they go with."""

    channels, num_classes, class_names = 1, 0, ()

    def __init__(self, condition, size):
        self.condition, self.size = condition, size
        self.rows = torch.randn(256, *condition.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"x": row.mean().expand(1, self.size, self.size).clone(), "condition": row}


@register_dataset("vectors")
def vectors(size, split="train", null="learnt"):
    """Pictures of one level, and the level as a vector."""
    return Levels(VectorCondition(1, null), size)


@register_dataset("texts")
def texts(size, split="train"):
    """Pictures of one level, and the level as tokens."""
    return Levels(TokenCondition(3, 2), size)


class TextNet(Pretrained):
    conditions = ("tokens",)

    def __init__(self, in_channels, num_classes, condition, width=16):
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "condition": condition, "width": width}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.null_token = nn.Parameter(torch.zeros(condition["dim"]))
        self.embed = nn.Linear(condition["dim"] + 1, width)
        self.out = nn.Conv2d(in_channels + width, in_channels, 3, padding=1)

    def forward(self, x, t, y):
        y = torch.where(y.isnan(), self.null_token, y.to(x.dtype)).mean(dim=1)
        c = self.embed(torch.cat([y, t[:, None].to(x.dtype)], dim=1)).tanh()[:, :, None, None]
        return self.out(torch.cat([x, c.expand(-1, -1, *x.shape[-2:])], dim=1))
'''
RECIPE = """
base: digits-urepa
plugins: [levels]
data: {{name: {data}, size: 8}}
model: {model}
alignments: []
evaluate: null
train: {{steps: {steps}, batch_size: 32, log_every: 100, sample_every: {steps}, checkpoint_every: {steps},
        label_dropout: 0.2, ema_decay: 0.95, learning_rate: 3e-3, warmup_steps: 0}}
sample: {{solver: heun, steps: 10, num: 8, guidance: {{scale: 1.5, interval: [0, 1]}}}}
"""
SMALL_DIC = "{name: DiC, width: 8, depths: [1, 1, 1, 1, 1]}"


def command(*arguments) -> None:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 0


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "levels", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    Path("levels.py").write_text(PLUGIN)
    return tmp_path


def trained(data: str, model: str, steps: int) -> None:
    Path("mine.yaml").write_text(RECIPE.format(data=data, model=model, steps=steps))
    command("train", "mine.yaml", "--out=run")


def grey(folder: str, num: int) -> torch.Tensor:
    """The mean of each image, in [-1, 1]."""
    return torch.stack([load_png(Path(folder) / f"{i:06d}.png").mean() * 2 - 1 for i in range(num)])


@pytest.mark.parametrize(
    ("condition", "rows", "null"),
    [
        (ClassLabels(7), torch.tensor([0, 6]), torch.tensor(7)),
        (NoCondition(), torch.tensor([0, 0]), torch.tensor(0)),
        (VectorCondition(3, "zeros"), torch.ones(2, 3), torch.zeros(3)),
        (VectorCondition(3), torch.ones(2, 3), torch.full((3,), torch.nan)),
        (TokenCondition(4, 3), torch.ones(2, 4, 3), torch.full((4, 3), torch.nan)),
    ],
)
def test_dropped_rows_are_null_and_the_others_stay(condition, rows, null):
    condition.check(rows)
    torch.testing.assert_close(condition.drop(rows, MASK), torch.stack([null, rows[1]]), equal_nan=True)
    same = create_condition(**condition.options())
    assert (type(same), same.to_dict()) == (type(condition), condition.to_dict())
    with pytest.raises(UserError, match="the condition is"):
        condition.check(torch.ones(2, 9))


def test_a_plain_models_null_is_its_num_classes():
    plain = lambda x, t, y: x  # noqa: E731
    assert null_of(plain) is None
    plain.num_classes = 5
    assert null_of(plain)(torch.tensor([0, 3])).tolist() == [5, 5]


def test_it_is_kept_beside_the_weights(tmp_path):
    examples = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    SavedData(None, TokenCondition(4, 2, "zeros", examples, ["a", "b", "ü"])).write(tmp_path)
    kept = SavedData.read(tmp_path).condition
    assert torch.equal(kept.examples, examples)
    assert kept.names == ("a", "b", "ü")
    assert kept.to_dict() == {"kind": "tokens", "length": 4, "dim": 2, "null": "zeros"}
    (tmp_path / "data.json").write_text('{"autoencoder": null, "class_names": ["cat", "dog"]}')  # of an older run
    old = SavedData.read(tmp_path).condition
    assert (old.count, old.names) == (2, ("cat", "dog"))


def test_data_without_examples_lends_some_of_its_own():
    data = RandomData(8, condition={"kind": "vector", "dim": 3, "null": "learnt"}, length=64)
    condition = condition_of_data(data)
    assert condition.count == 10
    rows = condition.rows(torch.tensor([0, 9, 10]))
    torch.testing.assert_close(
        rows, torch.stack([data.rows[0], data.rows[63], rows.new_full((3,), torch.nan)]), equal_nan=True
    )
    assert torch.equal(data[5]["condition"], data.rows[5])


class Exact(Pretrained):
    """The velocity of N(slope * y, std^2) for a number y; for the null, of y = -spread or spread, as often."""

    in_channels, num_classes = 2, 0

    def __init__(self):
        super().__init__()
        self.config = {"condition": {"kind": "vector", "dim": 1, "null": "learnt"}}
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, y):
        return torch.cat([field(y[i])(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])


def field(y):
    numbers = [-SPREAD, SPREAD] if y.isnan().all() else [y.double().item()]
    means = [(SLOPE * number).tolist() for number in numbers]
    return GaussianMixture(means, [1 / len(means)] * len(means), STD).velocity(LinearPath())


@pytest.mark.parametrize("doubled", [True, False])
def test_guidance_moves_away_from_the_null(doubled):
    x = torch.randn(2, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, y = torch.full((2,), 0.6, dtype=torch.float64), torch.tensor([[0.9], [-0.2]])
    guided = Guidance(2.5, (0.0, 1.0), doubled=doubled).bind(FlowMatching().velocity_model(Exact()), y)(x, t)
    strong = torch.cat([field(y[i])(x[i : i + 1], t[:1]) for i in range(2)])
    weak = field(torch.tensor([torch.nan]))(x, t)
    torch.testing.assert_close(guided, weak + 2.5 * (strong - weak), atol=1e-6, rtol=0)


def test_samples_follow_the_vector():
    """Without guidance the flow of a Gaussian carries noise z to its mean plus std * z."""
    settings = SampleSection(solver="dopri5", rtol=1e-8, atol=1e-8, num=3, batch_size=2)
    condition = VectorCondition(1, examples=torch.tensor([[0.5], [-1.0], [0.0]]))
    sampler = Sampler(Exact(), FlowMatching(), settings, (2, 1, 1), decode=lambda x: x, condition=condition)
    labels = torch.tensor([1, 0, 2])
    expected = SLOPE * condition.examples[labels] + STD * initial_noise((2, 1, 1), settings.seed, range(3)).flatten(1)
    torch.testing.assert_close(torch.cat(list(sampler(labels))).flatten(1).double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="the model has the examples 0 to 2, and 3 for none"):
        next(sampler(torch.tensor([4])))


def test_dic_learns_its_null():
    options = {"width": 8, "depths": (1, 1, 1, 1, 1), "in_channels": 1, "num_classes": 0}
    model = DiC(**options, condition=VectorCondition(3).to_dict())
    nn.init.normal_(model.output.modulation.weight)
    nn.init.normal_(model.output.conv2.weight)
    for level in model.condition:
        nn.init.normal_(level.label.null)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, 3)
    dropped = model(x, t, model.conditioned_on.drop(y, MASK))
    torch.testing.assert_close(dropped[1], model(x, t, y)[1])
    dropped.sum().backward()
    for level in model.condition:
        assert level.label.null.grad.abs().sum() > 0
        level.label.null.data = y[0].clone()
    torch.testing.assert_close(model(x, t, model.conditioned_on.drop(y, MASK)), model(x, t, y))
    assert DiC(**options, condition=VectorCondition(3, "zeros").to_dict()).condition[0].label.null is None


def test_a_denoiser_that_cannot_take_it_says_so():
    with pytest.raises(UserError, match="model 'SiT-S/2' cannot be conditioned on vectors of 3 numbers: it takes"):
        create_denoiser("SiT-S/2", **VectorCondition(3).options())
    with pytest.raises(UserError, match="model 'DiC-S' cannot be conditioned on sequences of 5 tokens of 3 numbers"):
        create_denoiser("DiC-S", **TokenCondition(5, 3).options())


@pytest.mark.slow
def test_a_run_on_vectors(place):
    trained("vectors", SMALL_DIC, 150)
    assert Path("run/samples/step_00000150.png").is_file()
    ema = Path("run/checkpoints/step_00000150/ema")
    assert load_file(ema / "model.safetensors")["condition.0.label.null"].abs().sum() > 0  # some rows were dropped
    np.save("wanted.npy", np.array([[-0.8], [0.8]], np.float32))
    call = f"{sys.executable} -m dic_repa sample run --num 8 --out out --trust-code --conditions".split()
    done = subprocess.run([*call, "wanted.npy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    levels = grey("out", 8)
    assert levels[::2].max() < -0.3
    assert levels[1::2].min() > 0.3
    assert json.loads(Path("out/samples.json").read_text())["labels"] == [0, 1] * 4
    command(
        "sample", "run", "--classes", "0", "--scale", "1", "--num", "4", "--out", "first", "--trust-code"
    )  # an example of the data
    wanted = SavedData.read(ema).condition.examples[0].item()
    assert (grey("first", 4).mean() - wanted).abs() < 0.35
    images = load("run", trust_code=True).sample(conditions=np.array([[0.8], [-0.8]]))
    assert np.asarray(images[0]).mean() > np.asarray(images[1]).mean() + 40
    np.save("other.npy", np.array([[0.0]], np.float32))
    done = subprocess.run([*call, "other.npy"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "exists with other samples (conditions differ)" in done.stderr


def test_a_run_on_tokens(place):
    trained("texts", "{name: 'levels:TextNet', width: 24}", 150)
    np.save("wanted.npy", np.stack([np.full((3, 2), -0.8), np.full((3, 2), 0.8)]).astype(np.float32))
    command("sample", "run", "--conditions", "wanted.npy", "--num", "8", "--out", "out", "--trust-code")
    levels = grey("out", 8)
    assert levels[1::2].min() > levels[::2].max() + 0.2


def test_examples_of_a_file_are_checked(tmp_path):
    file, condition = tmp_path / "rows.npy", VectorCondition(3)
    for rows, message in (
        (np.zeros((2, 4), np.float32), "vectors of 3 numbers"),
        (np.zeros((2, 3), int), "must hold finite floats"),
        (np.full((2, 3), np.nan), "must hold finite floats"),
    ):
        np.save(file, rows)
        with pytest.raises(UserError, match=message):
            read_examples(condition, file)
    good = tmp_path / "good.npy"
    np.save(good, np.zeros((2, 3)))
    assert read_examples(condition, good).count == 2
    with pytest.raises(UserError, match="conditioned on 10 classes"):
        read_examples(ClassLabels(10), good)
    file.write_text("no array")
    with pytest.raises(UserError, match="is not an array of numpy's format"):
        read_examples(condition, file)
