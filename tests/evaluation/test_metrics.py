"""The scores against NumPy and SciPy on the same features, closed forms, and torch-fidelity's own command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from inception import write_inception
from PIL import Image

from dic_repa.data.digits import load_digits
from dic_repa.errors import UserError
from dic_repa.evaluation import Judge, Measure, Metric, manifolds, metrics, open_images
from dic_repa.evaluation.digits import Digits
from dic_repa.evaluation.extractors import Inception, extractors
from dic_repa.evaluation.features import FeatureSet, RunningStatistics, extract, statistics
from dic_repa.evaluation.manifolds import manifold_radii, within_manifold


def draw(count: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return (torch.randn(count, dim, generator=generator) @ mix) * scale + shift


def as_reference(features: torch.Tensor, layer: str) -> FeatureSet:
    return FeatureSet(len(features), None, {layer: statistics(features)}, {layer: features})


@pytest.mark.parametrize(("name", "dim"), [("fid", 64), ("sfid", 33), ("fd-dinov2", 24)])
def test_frechet_scores_match_scipy(name, dim):
    score = metrics.create(name)
    samples, real = draw(300, dim, 0), draw(500, dim, 1, 1.3, 0.2)
    a, b = samples.double().numpy(), real.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert score(samples, as_reference(real, score.layer)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_sfid_matches_scipy_at_all_its_dimensions():
    """Of 2,023, with more samples than that; the root's trace by the eigenvalues of L^T B L, which for A = L L^T are
    those of the product A B."""
    generator, sets = torch.Generator().manual_seed(0), []
    for count, scale, shift in ((2600, 1.0, 0.0), (3000, 1.2, 0.1)):
        mix = torch.eye(2023) + 0.5 * torch.randn(2023, 2023, generator=generator) / 2023**0.5
        sets.append(torch.randn(count, 2023, generator=generator) @ mix * scale + shift)
    a, b = (features.double().numpy() for features in sets)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    factor = scipy.linalg.cholesky(cov_a, lower=True)
    root = np.sqrt(scipy.linalg.eigvalsh(factor.T @ cov_b @ factor)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    score = metrics.create("sfid")
    assert score(sets[0], as_reference(sets[1], score.layer)) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_two_gaussians_in_closed_form():
    """For N(0, I) and N(m, s^2 I) it is |m|^2 + D (1 - s)^2, which sampled features come near."""
    dim, scale, shift, score = 16, 1.5, 0.5, metrics.create("fid")
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(40_000, dim, generator=generator) for _ in range(2))
    expected = dim * shift**2 + dim * (1 - scale) ** 2
    assert score(a * scale + shift, as_reference(b, score.layer)) == pytest.approx(expected, rel=0.03)
    exact = FeatureSet(2, None, {score.layer: (torch.zeros(dim), torch.eye(dim))})
    whitened = (a - a.mean(0)).double() @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.double().mT))).mT
    assert score(whitened * scale + shift, exact) == pytest.approx(expected, rel=1e-6)


def test_inception_score_matches_numpy_in_parts_of_5000():
    logits = draw(12_000, 10, 2, 2.0)
    p = scipy.special.softmax(logits.double().numpy(), axis=1)
    expected = []
    for part in (p[:5000], p[5000:10_000], p[10_000:]):
        kl = (part * (np.log(part) - np.log(part.mean(0, keepdims=True)))).sum(1)
        expected.append(np.exp(kl.mean()))
    assert metrics.create("is")(logits, None) == pytest.approx(np.mean(expected), rel=1e-4)


def test_precision_and_recall_match_every_distance_computed():
    samples, real = draw(150, 6, 4, 0.8), draw(200, 6, 5, 1.0, 0.3)
    a, b = samples.double().numpy(), real.double().numpy()

    def inside(points, others):
        own = np.linalg.norm(others[:, None] - others[None], axis=2)
        radii = np.sort(own, axis=1)[:, 3]  # the first is the distance to itself
        return (np.linalg.norm(points[:, None] - others[None], axis=2) <= radii).any(1).mean()

    reference = as_reference(real, "inception.pool")
    precision, recall = inside(a, b), inside(b, a)
    assert 0.1 < precision < 0.99
    assert 0.1 < recall < 0.99
    assert metrics.create("prec")(samples, reference) == pytest.approx(precision, rel=1e-4)
    assert metrics.create("recall")(samples, reference) == pytest.approx(recall, rel=1e-4)


def test_density_and_coverage_match_every_distance_computed():
    """Also where samples lie on the edge of a ball, which does not belong to it: all are whole numbers."""
    samples, real = draw(150, 6, 4, 1.6).round(), draw(200, 6, 5, 2.0, 0.6).round()
    a, b = samples.double().numpy(), real.double().numpy()
    radii = np.sort(np.linalg.norm(b[:, None] - b[None], axis=2), axis=1)[:, 5]  # the first is the distance to itself
    held = np.linalg.norm(b[:, None] - a[None], axis=2) < radii[:, None]
    density, coverage = held.sum() / (5 * 150), held.any(axis=1).mean()
    assert 0.1 < coverage < 0.9
    reference = as_reference(real, "inception.pool")
    assert metrics.create("density")(samples, reference) == pytest.approx(density, rel=1e-4)
    assert metrics.create("coverage")(samples, reference) == pytest.approx(coverage, rel=1e-4)


def test_density_and_coverage_of_one_distribution_in_closed_form():
    """Expected: density 1, and coverage 1 - prod_(i = 1..k) (N - i) / (N + M - i), as in arXiv 2002.09797."""
    n, m, k = 3000, 2000, 5
    samples, reference = draw(m, 4, 0), as_reference(draw(m + n, 4, 0)[m:], "inception.pool")
    missed = np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    assert metrics.create("density")(samples, reference) == pytest.approx(1, abs=0.05)
    assert metrics.create("coverage")(samples, reference) == pytest.approx(1 - missed, abs=0.02)
    assert manifolds.expected_coverage(n, m, k) == pytest.approx(1 - missed)


def test_mind_is_the_optimal_transport_on_lines():
    """Against the assignment that costs least, found without sorting, on lines of other random directions."""
    samples, real = draw(40, 3, 0, 1.3), draw(40, 3, 1, 1.0, 0.5)
    lines = np.random.default_rng(0).normal(size=(3, 1500))
    a, b = (part.double().numpy() @ (lines / np.linalg.norm(lines, axis=0)) for part in (samples, real))
    costs = []
    for line in range(a.shape[1]):
        between = (a[:, None, line] - b[None, :, line]) ** 2
        costs.append(between[scipy.optimize.linear_sum_assignment(between)].mean())
    score = metrics.create("mind")(samples, as_reference(real, "inception.pool"))
    assert score == pytest.approx(3 * 3 * np.mean(costs), rel=0.05)


def test_mind_of_isotropic_gaussians_is_three_times_their_frechet_distance():
    dim, scale, score = 8, 3.0, metrics.create("mind")
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(count, dim, generator=generator) for count in (2000, 2500))
    reference = as_reference(b, score.layer)
    found = score(a * scale, reference)
    assert found == pytest.approx(3 * dim * (1 - scale) ** 2, rel=0.05)
    assert score(a * scale, reference) == found  # by the same lines, and the same choice of the 2,500
    assert score(a, as_reference(a, score.layer)) == 0


def test_manifolds_are_the_same_in_blocks(monkeypatch):
    a, b = draw(70, 5, 6), draw(90, 5, 7)
    parts = (manifolds.balls_around, manifolds.balls_that_hold)
    radii, inside, held = manifold_radii(b), within_manifold(a, b), [part(a, b, 5) for part in parts]
    monkeypatch.setattr(manifolds, "BLOCK", 90 * 16)
    torch.testing.assert_close(manifold_radii(b), radii)
    assert torch.equal(within_manifold(a, b), inside)
    assert all(torch.equal(part(a, b, 5), before) for part, before in zip(parts, held))


def test_kid_matches_numpy_on_one_whole_subset():
    samples, real = draw(40, 8, 8), draw(40, 8, 9, 1.2)
    kernel = lambda x, y: (x.double().numpy() @ y.double().numpy().T / 8 + 1) ** 3  # noqa: E731
    xx, yy, xy = kernel(samples, samples), kernel(real, real), kernel(samples, real)
    within = ((xx.sum() - np.trace(xx)) + (yy.sum() - np.trace(yy))) / (40 * 39)
    score = metrics.create("kid")(samples, as_reference(real, "inception.pool"))  # each of its subsets is all of them
    assert score == pytest.approx(within - 2 * xy.mean(), rel=1e-4)


def test_a_set_against_itself():
    features = draw(400, 32, 10)
    reference = as_reference(features, "inception.pool")
    assert metrics.create("fid")(features, reference) == pytest.approx(0, abs=1e-6)
    assert metrics.create("prec")(features, reference) == metrics.create("recall")(features, reference) == 1
    assert abs(metrics.create("kid")(features, reference)) < 0.05


def test_infinity_takes_the_bias_out():
    """Two sets of one distribution are no distance apart, but few samples make it seem so."""
    truth = torch.randn(200, 200, generator=torch.Generator().manual_seed(1)).double() / 200**0.5
    reference = FeatureSet(2, None, {"inception.pool": (torch.zeros(200).double(), truth.mT @ truth)})
    samples = torch.randn(6000, 200, generator=torch.Generator().manual_seed(2)).double() @ truth
    plain = metrics.create("fid")(samples, reference)
    assert plain > 0.5
    assert abs(metrics.create("fid-infinity")(samples, reference)) < plain / 5


def test_bootstrap_deviation_is_that_of_the_sampling():
    score, reference = metrics.create("fid"), as_reference(draw(4000, 4, 0, 1.0), "inception.pool")
    again = [score(draw(4000, 4, 0)[torch.randperm(4000)[:1000]] + 0.5, reference) for _ in range(30)]
    one = draw(4000, 4, 0)[:1000] + 0.5
    assert score.deviation(one, reference, 60) == pytest.approx(np.std(again), rel=0.5)
    inside = torch.tensor([True] * 30 + [False] * 70)
    precision = metrics.create("prec")
    object.__setattr__(precision, "_inside", lambda *arguments: inside)
    try:
        assert precision.deviation(one, reference, 10) == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
    finally:
        object.__delattr__(precision, "_inside")


def test_bootstrap_of_kid_is_of_the_samples_not_of_the_subsets():
    """With fewer samples than a subset has, every subset is all of them, which tells nothing of other samples."""
    score, reference = metrics.create("kid"), as_reference(draw(60, 4, 0), "inception.pool")
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(4000, generator=generator)[:60] for _ in range(20)]
    again = [score(draw(4000, 4, 0)[rows] + 0.5, reference) for rows in drawn]
    one = draw(4000, 4, 0)[:60] + 0.5
    assert score.deviation(one, reference, 20) == pytest.approx(np.std(again), rel=0.6)


def test_statistics_of_batches_are_those_of_the_whole():
    features = draw(500, 12, 11, 0.01, 300.0)  # a mean that is large against the spread
    running = RunningStatistics()
    for part in features.split(37):
        running.update(part)
    mean, cov = running.result()
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-6, atol=1e-12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("weights") / "pt_inception.pth")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 10 pictures of 24 pixels: noise of different smoothness."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, cells in (("samples", 4), ("real", 8)):
        (root / name).mkdir()
        for i in range(10):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            small.resize((24, 24), Image.Resampling.BICUBIC).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def measured(weights, folders):
    """Both folders' features by Inception, and the scores."""
    names = ["fid", "is-torch-fidelity"]  # sFID, as many dimensions again, would take as long again
    options = {"inception": {"weights": weights}}
    measure = Measure(names, folders / "real", extractor_options=options, cache=False, batch_size=10)
    return measure, measure(open_images(folders / "samples"))


@pytest.mark.slow
def test_fid_and_is_are_those_of_torch_fidelity(measured, weights, folders):
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--isc", "--fid", "--cpu", "--json", "--silent"]
    command += ["--input1", folders / "samples", "--input2", folders / "real", "--no-cache", "--save-cpu-ram"]
    command += ["--feature-extractor-weights-path", weights]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout[done.stdout.index("{") :])
    ours = measured[1].values
    assert theirs["frechet_inception_distance"] > 1
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["is-torch-fidelity"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def test_fid_of_pictures_matches_scipy_on_the_same_features(measured, folders):
    measure, found = measured
    features = measure.extractors["inception"](next(open_images(folders / "samples").batches([range(10)])))
    a, b = features["pool"].double().numpy(), measure.reference.features["inception.pool"].double().numpy()
    # Of so few images the covariances are singular; the roots' trace is the nuclear norm of the centred product.
    centred = [(x - x.mean(0)) / 9**0.5 for x in (a, b)]
    root = scipy.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((c**2).sum() for c in centred) - 2 * root
    assert found.values["fid"] == pytest.approx(expected, rel=1e-4)
    assert any("covariance is singular" in warning for warning in found.warnings)
    assert any("biases upward: fid; the metric fid-infinity extrapolates" in warning for warning in found.warnings)


def test_spatial_features_are_the_first_channels_of_mixed_6d_laid_out_as_in_tensorflow(measured, folders):
    network = measured[0].extractors["inception"]
    images = next(open_images(folders / "samples").batches([range(2)]))
    seen = {}
    hook = network.model.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    features = network(images)
    hook.remove()
    assert features["spatial"].shape == (2, 2023)
    # The block's output starts with its 1x1 branch, TensorFlow's mixed_6/conv; there, channels are the last axis.
    assert torch.equal(features["spatial"].view(2, 17, 17, 7), seen["block"][:, :7].permute(0, 2, 3, 1))
    assert features["pool"].shape == (2, 2048)
    assert features["logits"].shape == (2, 1008)
    unbiased = features["pool"] @ network.model.fc.weight.mT
    torch.testing.assert_close(features["logits"], unbiased)


def test_inception_without_weights_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url, path, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        UserError, match=r"fetch https://github.com/toshas/.*6726825d.pth .*--inception-weights"
    ) as error:
        Inception()
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(tmp_path, weights):
    torch.save(Digits().model.state_dict(), tmp_path / "digits.pth")
    with pytest.raises(UserError, match=r"digits.pth \(Inception weights\) does not fit this InceptionV3") as error:
        Inception(tmp_path / "digits.pth")
    assert "\n" not in str(error.value)
    torch.save(torch.nn.Linear, tmp_path / "pickle.pth")
    with pytest.raises(UserError, match="file of plain tensors"):
        Inception(tmp_path / "pickle.pth")
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"half\.pth"):
        Inception(tmp_path / "half.pth")


def test_dinov2_features_are_timms_class_token():
    import timm

    measure = Measure(["fd-dinov2"], FeatureSet(2, None, {"dinov2.cls": (torch.zeros(64), torch.eye(64))}), **TINY_VIT)
    network = measure.extractors["dinov2"]
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, dynamic_img_size=True, global_pool="token")
    model.load_state_dict({k: v for k, v in network.encoder.model.state_dict().items() if k in model.state_dict()})
    config = model.pretrained_cfg
    resize = lambda array: np.asarray(Image.fromarray(array).resize((224, 224), Image.Resampling.BICUBIC))  # noqa: E731
    resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = model.eval()((torch.tensor(resized).permute(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(network(images)["cls"], expected, atol=2e-2, rtol=0)  # Pillow rounds in between


TINY_VIT = {"extractor_options": {"dinov2": {"encoder": "timm:test_vit", "pretrained": False}}, "cache": False}


class Spread(Metric):
    """A metric of one's own, on the features of the judge of digits."""

    needs = ""

    def __init__(self, layer="digits.features", scale=1.0):
        super().__init__(layer, "spread")
        object.__setattr__(self, "scale", scale)

    def __call__(self, features, reference):
        return self.scale * features.std().item()


def test_a_metric_of_ones_own():
    own = f"{__name__}:Spread"
    images = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    (value,) = Measure([own])([images]).values.values()
    features = extract([images], {"digits": extractors.create("digits")}, ["digits.features"]).features
    assert value == pytest.approx(features["digits.features"].std().item())
    assert Judge([own])(images, torch.zeros(20, dtype=torch.long)) == {own: pytest.approx(value)}
    with pytest.raises(UserError, match="unknown metric 'fdi'; did you mean fid"):
        Measure(["fdi"])


def test_labels_are_needed_to_say_what_is_recognised():
    images, labels = load_digits("held-out")
    with pytest.raises(UserError, match="recognised: the images do not tell"):
        Measure(["recognised"])(images.split(500))
    measured = Measure(["recognised"])(images.split(500), bootstrap=5, labels=labels)
    share = measured.values["recognised"]
    assert share > 0.98
    low, high = measured.intervals["recognised"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 2000))
