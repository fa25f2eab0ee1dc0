"""CKA, CKNNA and the linear probe against NumPy and known answers; `dic-repa probe` on small runs."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from dic_repa.cli import main
from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.data.digits import Digits
from dic_repa.data.latents import LatentDataset
from dic_repa.errors import UserError
from dic_repa.evaluation.cka import cknna, linear_cka, linear_probe, unbiased_hsic
from dic_repa.evaluation.probe import probe_checkpoint, stage_taps
from dic_repa.models import DiC, create_denoiser
from dic_repa.recipe import load_recipe, to_yaml
from dic_repa.recipe.build import build_dataset, build_encoder
from dic_repa.runs.folder import RunFolder


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(features(9, size, size))[0]


def cka_by_its_definition(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with explicit centring matrices."""
    n = len(x)
    h = np.eye(n) - np.full((n, n), 1 / n)

    def hsic(k, m):
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def hsic_over_tuples(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased HSIC as what it is: a mean over all ordered tuples of four different images."""
    tuples = list(itertools.permutations(range(len(k)), 4))
    return sum(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in tuples) / len(tuples)


def cknna_by_its_definition(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """The formula with explicit matrices, and neighbours by sorting."""
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y))
    n, ones = len(x), np.ones(len(x))

    def near(f):
        mask = np.zeros((n, n))
        for i in range(n):
            mask[i, sorted(set(range(n)) - {i}, key=lambda j: -float(f[i] @ f[j]))[:k]] = 1
        return mask

    def hsic(a, b):
        value = np.trace(a @ b) + (ones @ a @ ones) * (ones @ b @ ones) / ((n - 1) * (n - 2))
        return (value - 2 / (n - 2) * (ones @ a @ b @ ones)) / (n * (n - 3))

    a, b, near_x, near_y = x @ x.T, y @ y.T, near(x), near(y)
    both = near_x * near_y
    return hsic(a * both, b * both) / np.sqrt(hsic(a * near_x, a * near_x) * hsic(b * near_y, b * near_y))


@pytest.mark.parametrize(("n", "wide"), [(40, 7), (12, 30)])  # more rows than columns, and fewer
def test_cka_is_its_definition(n, wide):
    x = features(0, n, wide) + 3
    y = x[:, :5] ** 2 + features(1, n, 5)
    assert linear_cka(x, y) == pytest.approx(cka_by_its_definition(x.numpy(), y.numpy()), rel=1e-10)


def test_cka_of_known_answers():
    x = features(0, 500, 12)
    assert linear_cka(x, x @ rotation(12) * 0.3 + 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, features(1, 500, 12)) < 0.05  # unrelated: about 12 * 12 / 500 over the norms' 12
    left, right = x[:, :1], x[:, :2] - x[:, :2].mean(dim=0)
    white = right @ torch.linalg.inv(torch.linalg.cholesky(right.mT @ right)).mT
    assert linear_cka(white[:, :1], white) == pytest.approx(1 / np.sqrt(2), rel=1e-10)  # one of two equal directions
    assert linear_cka(left, torch.ones(500, 3)) == 0


@pytest.mark.parametrize("k", [2, 4, 23])
def test_cknna_is_its_definition(k):
    x = features(0, 24, 6)
    y = torch.cat([x[:, :3], features(1, 24, 2)], dim=1)
    assert cknna(x, y, k) == pytest.approx(cknna_by_its_definition(x.numpy(), y.numpy(), k), rel=1e-10)


def test_the_unbiased_hsic_is_a_mean_over_tuples():
    x, y = features(0, 8, 3), features(1, 8, 2)
    k, m = x @ x.mT, y @ y.mT
    assert unbiased_hsic(k, m) == pytest.approx(hsic_over_tuples(k.numpy(), m.numpy()), rel=1e-10)


def test_cknna_of_all_neighbours_is_unbiased_cka():
    x, y = (torch.nn.functional.normalize(f, dim=1) for f in (features(0, 9, 4), features(1, 9, 3)))
    k, m = (x @ x.mT).numpy(), (y @ y.mT).numpy()
    expected = hsic_over_tuples(k, m) / np.sqrt(hsic_over_tuples(k, k) * hsic_over_tuples(m, m))
    assert cknna(x, y, 8) == pytest.approx(expected, rel=1e-9)


def test_cknna_of_known_answers():
    x = features(0, 300, 8)
    assert cknna(x, x @ rotation(8) * 7) == pytest.approx(1, abs=1e-12)
    assert abs(cknna(x, features(1, 300, 8))) < 0.1
    near = x + 0.05 * features(2, 300, 8)
    assert 0.6 < cknna(x, near) < 1
    assert cknna(x, features(1, 300, 8)) < cknna(x, x + features(2, 300, 8)) < cknna(x, near)


def test_the_linear_probe_is_ridge_regression():
    x, y = features(0, 60, 5), torch.arange(60) % 3
    test_x, test_y = features(1, 30, 5), torch.arange(30) % 3
    mean, std = x.numpy().mean(0), x.numpy().std(0, ddof=1)
    a = np.concatenate([(x.numpy() - mean) / std, np.ones((60, 1))], axis=1)
    penalty = np.sqrt(0.5 * 60) * np.eye(6)[:5]  # of the weights, not of the offset
    targets = np.eye(3)[y.numpy()]
    weights = np.linalg.lstsq(np.vstack([a, penalty]), np.vstack([targets, np.zeros((5, 3))]), rcond=None)[0]
    predicted = np.c_[(test_x.numpy() - mean) / std, np.ones(30)] @ weights
    expected = (predicted.argmax(1) == test_y.numpy()).mean()
    assert linear_probe(x, y, test_x, test_y, 3, ridge=0.5) == pytest.approx(expected)


def test_the_linear_probe_tells_what_can_be_told():
    labels = torch.arange(400) % 4
    apart = 5 * torch.eye(4)[labels] + features(0, 400, 4)
    assert linear_probe(apart[:200], labels[:200], apart[200:], labels[200:], 4) > 0.95
    blind = features(1, 400, 4)
    assert linear_probe(blind[:200], labels[:200], blind[200:], labels[200:], 4) < 0.4


def test_features_that_cannot_be_compared():
    with pytest.raises(UserError, match="same two or more images"):
        linear_cka(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(UserError, match="NaN"):
        linear_cka(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(UserError, match="not 5 of 5"):
        cknna(torch.rand(5, 2), torch.rand(5, 2), 5)


def test_taps_of_each_stage():
    denoiser = DiC(width=8, depths=(1, 3, 5, 2, 2), in_channels=1, num_classes=10)
    taps = stage_taps(denoiser, (16, 16), 2, ["mid.2"])
    assert taps == "enc.0.0 enc.1.0 enc.1.2 mid.0 mid.2 mid.4 dec.1.0 dec.1.1 dec.0.0 dec.0.1".split()
    sit = create_denoiser("SiT", 4, 10, width=16, depth=6, num_heads=2)
    assert stage_taps(sit, (8, 8), 3) == ["blocks.0", "blocks.2", "blocks.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        with pytest.raises(SystemExit, match="0"):
            main(["train", "digits-urepa", "--out", "run", *TINY, "--set=train.steps=4", "--set=evaluate=null"])
    return RunFolder(folder / "run")


def test_a_run_is_probed(run):
    record, files = probe_checkpoint(run.path, num=60, times=(0.1, 0.9))
    assert record == json.loads((run.path / "probe/probe.json").read_text())
    assert record["taps"] == ["enc.0.0", "enc.1.0", "mid.0", "dec.1.0", "dec.0.0"]
    assert (record["step"], record["encoder"], record["aligned"], record["split"]) == (
        4,
        "digits-vit",
        ["mid.0"],
        "held-out",
    )
    for name in ("cka", "cknna", "linear_probe"):
        scores = np.array(record["scores"][name])
        assert scores.shape == (5, 2)
        assert (scores[:, 0] != scores[:, 1]).any()
        assert ((scores >= -1) & (scores <= 1)).all()
    cosines = record["scores"]["cosine"]
    assert [row == [None, None] for row in cosines] == [True, True, False, True, True]
    assert [file.name for file in files if file.is_file()] == ["probe.json", "heatmaps.png", "taps.png"]
    assert probe_checkpoint(run.path, num=60, times=(0.1, 0.9), batch_size=7)[0]["scores"]["cka"] == [
        pytest.approx(row, abs=2e-5) for row in record["scores"]["cka"]
    ]


def test_the_cosine_is_that_of_the_trained_head(run):
    """At the noise level 0 the tap's map can be had by hand: data in, the null class, the head on what came out."""
    recipe = run.recipe()
    record = probe_checkpoint(run.path, num=30, times=(0.0,), taps=["mid.0"])[0]
    state = load_file(run.newest_checkpoint() / "model.safetensors")
    weights = {name.split("head.layers.")[1]: v for name, v in state.items() if "head.layers." in name}
    data = build_dataset(recipe.data, "held-out")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:30]
    denoiser = DiC.from_pretrained(run.newest_checkpoint() / "ema")
    seen = []
    denoiser.mid[0].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        denoiser(data.x[order], torch.zeros(30), torch.full((30,), 10))
        h = seen[0].permute(0, 2, 3, 1)
        for i in (0, 2, 4):
            h = torch.nn.functional.linear(h, weights[f"{i}.weight"], weights[f"{i}.bias"])
            h = torch.nn.functional.silu(h) if i < 4 else h
        h = torch.nn.functional.interpolate(h.permute(0, 3, 1, 2), (7, 7), mode="bilinear").flatten(2).mT
        tokens = build_encoder(recipe.alignments[0], torch.device("cpu"))(data.images[order])
    expected = ((h * tokens).sum(-1) / (h.norm(dim=-1) * tokens.norm(dim=-1))).mean().item()
    assert record["scores"]["cosine"][0][0] == pytest.approx(expected, abs=1e-5)


def test_the_null_class_keeps_the_label_from_the_probe(run):
    """Were the true class given, a tap behind the modulation would give it away."""
    record = probe_checkpoint(run.path, num=200, times=(1.0,), taps=["mid.0"])[0]
    assert record["scores"]["linear_probe"][0][0] < 0.3  # pure noise: a tenth is chance


def test_images_may_be_levels(run, monkeypatch):
    """As data sets of image files hand them out; an encoder takes them as floats."""

    def probed(kind):
        class Converted(Digits):
            def __getitem__(self, index):
                sample = super().__getitem__(index)
                return sample | {"image": kind((sample["image"] * 255).round().to(torch.uint8))}

        monkeypatch.setattr("dic_repa.evaluation.probe.build_dataset", lambda data, split: Converted(split, data.size))
        return probe_checkpoint(run.path, num=30, times=(0.5,), taps=["mid.0"])[0]["scores"]

    assert probed(lambda levels: levels) == probed(lambda levels: levels.float() / 255)


def test_the_posteriors_noise_is_each_images_own(run, monkeypatch):
    """Of data that is a posterior, with a spread that drowns its mean, the batch size changes nothing."""

    class Moments(Digits, LatentDataset):
        spec = AutoencoderSpec("a VAE", 1, 1, (0.0,), (1.0,))

        def __getitem__(self, index):
            sample = super().__getitem__(index)
            x = sample.pop("x")
            return sample | {"moments": torch.cat([x, torch.full_like(x, 3.0)])}

    monkeypatch.setattr("dic_repa.evaluation.probe.build_dataset", lambda data, split: Moments(split, data.size))
    one, other = (
        probe_checkpoint(run.path, num=60, times=(0.0, 0.5), taps=["mid.0"], batch_size=size)[0]["scores"]
        for size in (60, 20)
    )
    assert one.keys() == {"cka", "cknna", "linear_probe", "cosine"}
    for name, rows in one.items():
        assert other[name] == [pytest.approx(row, abs=2e-5) for row in rows]


def test_mistakes(mistake, run, tmp_path):
    recipe = load_recipe("digits-baseline", [option.removeprefix("--set=") for option in TINY])
    baseline = tmp_path / "baseline"
    DiC(width=8, depths=(1, 1, 1, 1, 1), in_channels=1, num_classes=10).save_pretrained(baseline)
    (baseline / "recipe.yaml").write_text(to_yaml(recipe))
    assert "--encoder digits-vit" in mistake("probe", baseline)
    assert "mid.0" in mistake("probe", run.path, "--taps", "mdi.0")
    assert "'--times': 2.0 is not in the range 0<=x<=1" in mistake("probe", run.path, "--times", "0.5,2")
    assert "digits-vit" in mistake("probe", run.path, "--encoder", "digit-vit")
    assert "no run or checkpoint folder" in mistake("probe", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty is neither a run nor a checkpoint" in mistake("probe", "empty")
    (tmp_path / "empty/recipe.yaml").write_text(to_yaml(recipe))
    for line in (("probe", "empty"), ("sample", "empty")):
        assert "empty has no checkpoint yet" in mistake(*line)
    assert "recipe.yaml is a file; name its folder" in mistake("probe", baseline / "recipe.yaml")
