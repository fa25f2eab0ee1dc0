"""The Fréchet distance against scipy and closed forms; the judge of digits on real ones, and on what it must refuse."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from dic_repa.data.digits import load_digits, resize
from dic_repa.errors import UserError
from dic_repa.evaluation import frechet_distance, judge_digits, metrics, statistics
from dic_repa.evaluation.digits import DigitsClassifier
from dic_repa.training.train_digits import main as train_digits


def random_covariance(dim: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    factor = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.mT / rank


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def held_out():
    images, labels = load_digits("held-out")
    return resize(images, 16), labels


def test_frechet_distance_matches_scipy(generator):
    a, b = random_covariance(12, 30, generator), random_covariance(12, 20, generator)
    mean_a, mean_b = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real
    expected = (mean_a - mean_b).square().sum().item() + np.trace(a.numpy() + b.numpy() - 2 * root)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_commuting_gaussians(generator):
    # With common axes the distance is |mean_a - mean_b|^2 + sum (sqrt(a_i) - sqrt(b_i))^2; zeros make both singular.
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    a = torch.tensor([4, 1, 0.25, 9, 0, 0, 2, 1e-3], dtype=torch.float64)
    b = torch.tensor([1, 1, 4, 0, 0, 3, 0.5, 1e3], dtype=torch.float64)
    mean_a, mean_b = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    distance = frechet_distance(mean_a, axes * a @ axes.mT, mean_b, axes * b @ axes.mT)
    assert distance == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_with_fewer_samples_than_dimensions(generator):
    features = torch.randn(5, 40, generator=generator)
    mean, cov = statistics(features)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(mean, cov, mean + 1, cov) == pytest.approx(40, abs=1e-5)
    # Scaling by 3 about the mean scales the covariance by 9: the distance is tr((3 - 1)^2 cov).
    assert frechet_distance(mean, cov, mean, 9 * cov) == pytest.approx(4 * cov.trace().item(), rel=1e-6)


def test_statistics_match_numpy(generator):
    features = torch.randn(30, 6, generator=generator) * 3 + 100
    mean, cov = statistics(features)
    np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)
    assert mean.dtype == cov.dtype == torch.float64
    assert statistics(features[:, :1])[1].shape == (1, 1)


def test_bad_features_are_refused():
    with pytest.raises(UserError, match="two samples"):
        statistics(torch.zeros(1, 4))
    with pytest.raises(UserError, match="NaN"):
        statistics(torch.full((3, 4), torch.nan))
    with pytest.raises(UserError, match="of one D"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


def test_real_digits_are_recognised(held_out):
    images, labels = held_out
    scores = judge_digits(images, labels)
    assert scores["recognised"] >= 0.98
    assert scores["recognised"] == scores["recognised_count"] / 2000 == scores["reference"]["recognised"]
    assert scores["fd-digits"] == pytest.approx(0, abs=1e-4)  # they are rounded to 8 bits, after they were resized
    assert scores["count"] == scores["reference"]["count"] == 2000
    counts = torch.bincount(labels, minlength=10)
    right = sum(share * counts[int(digit)].item() for digit, share in scores["recognised_by_class"].items())
    assert right == pytest.approx(scores["recognised_count"])


def test_wrong_labels_are_not_recognised(held_out):
    images, labels = held_out
    scores = judge_digits(images[:500], (labels[:500] + 1) % 10)
    assert scores["recognised"] < 0.03


def test_images_of_no_class_count_for_the_distance_alone(held_out):
    images, labels = held_out
    null, known = torch.full((100,), 10), labels[:100]
    scores = judge_digits(images[:200], torch.cat([known, null]))
    alone = judge_digits(images[:100], known)
    assert scores["recognised"] == alone["recognised"]
    assert scores["fd-digits"] == judge_digits(images[:200], labels[:200])["fd-digits"]
    assert judge_digits(images[:100], null)["recognised"] is None


def test_scores_tell_good_digits_from_bad(held_out, generator):
    images, labels = held_out
    images, labels = images[:500], labels[:500]
    noisy = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    good, bad = judge_digits(images, labels), judge_digits(noisy, labels)
    assert bad["recognised"] < good["recognised"] - 0.2
    assert bad["fd-digits"] > 10 * good["fd-digits"]
    # All of one class are read well, and yet are far from the spread of real ones.
    images, labels = held_out
    ones = judge_digits(images[labels == 1], labels[labels == 1])
    assert ones["recognised"] > 0.95
    assert ones["fd-digits"] > 10 * ones["reference"]["fd-digits"]
    assert ones["recognised_by_class"]["0"] is None


def test_judging_is_deterministic_and_registered(held_out):
    images, labels = held_out
    assert metrics.create("digits").names == ("recognised", "fd-digits")
    assert judge_digits(images[:64], labels[:64]) == judge_digits(images[:64], labels[:64])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 2, 16, 16), torch.zeros(4, dtype=torch.long), r"\(N, 1 or 3, H, W\)"),
        (torch.zeros(16, 16), torch.zeros(4, dtype=torch.long), r"\(N, 1 or 3, H, W\)"),
        (torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), "float"),
        (torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.long), "at least two"),
        (torch.full((4, 1, 16, 16), torch.nan), torch.zeros(4, dtype=torch.long), "4 of 4 images hold NaN"),
        (torch.full((4, 1, 16, 16), -1.0), torch.zeros(4, dtype=torch.long), r"in \[0, 1\]"),
        (torch.zeros(4, 1, 16, 16), torch.zeros(3, dtype=torch.long), "4 integers"),
        (torch.zeros(4, 1, 16, 16), torch.zeros(4), "integers"),
        (torch.zeros(4, 1, 16, 16), torch.tensor([0, 1, 2, 11]), "0 to 9"),
        (torch.zeros(4, 1, 16, 16), torch.tensor([0, 1, 2, -1]), "0 to 9"),
    ],
)
def test_bad_input_is_refused_in_one_line(images, labels, message):
    with pytest.raises(UserError, match=message) as error:
        judge_digits(images, labels)
    assert "\n" not in str(error.value)


def test_shipped_weights_are_small():
    weights = resources.files("dic_repa.evaluation").joinpath("weights")
    assert sum(len(file.read_bytes()) for file in weights.iterdir()) < 2e6


def test_training_script_writes_weights_that_load(tmp_path, monkeypatch):
    digits = {split: tuple(part[:256] for part in load_digits(split)) for split in ("train", "held-out")}
    monkeypatch.setattr("dic_repa.training.train_digits.load_digits", digits.get)
    out = tmp_path / "new" / "weights.safetensors"
    result = CliRunner().invoke(train_digits, ["judge", "--epochs", "1", "--out", str(out)], catch_exceptions=False)
    assert "held-out accuracy" in result.output
    DigitsClassifier().load_state_dict(load_file(out))
