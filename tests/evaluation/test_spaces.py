"""The feature spaces of FDr and their ratio: timm's own modules and NumPy on small networks with random weights."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

from dic_repa.errors import UserError
from dic_repa.evaluation import Judge, Measure, frechet_distance, metrics, statistics
from dic_repa.evaluation.extractors import extractors
from dic_repa.evaluation.metrics import find_metric, title
from dic_repa.evaluation.ratios import SIX
from dic_repa.evaluation.spaces import SPACES, Space, TimmFeatures

# A small network of each kind: with a class token, with an attention pool, with a map.
SMALL = {"clip": "test_vit", "siglip": "test_vit3", "convnext": "test_convnext"}


def noise(count: int, seed: int, size: int = 16, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def space(name: str, size: int = 40) -> Space:
    return dataclasses.replace(SPACES[name], model=SMALL[name], size=size)


@pytest.mark.parametrize("name", SPACES)
def test_the_networks_are_those_of_the_papers(name):
    """Their names are known to timm, and so are the licences."""
    known = SPACES[name]
    published = get_pretrained_cfg(known.model)
    assert published.hf_hub_id == f"timm/{known.model}"
    if published.license:  # older releases do not tell
        assert ("-nc" in published.license) == ("NC" in known.licence)


@pytest.mark.parametrize("name", SMALL)
def test_features_are_those_of_timms_own_pooling(name, tmp_path):
    model = timm.create_model(SMALL[name], num_classes=0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    network = TimmFeatures(name, space(name, 160), tmp_path / "weights.safetensors")
    images = noise(2, 0, 48)
    resize = partial(torch.nn.functional.interpolate, size=(160, 160), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    prepared = (resize(images / 255) - mean) / std
    model.eval()
    found = network(images)["features"]
    expected = model.forward_features(prepared).mean((2, 3)) if name == "convnext" else model(prepared)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert network.made_of["weights"].endswith("weights.safetensors")
    assert bool(network.notes) == (name == "convnext")  # not for commercial use


def test_a_size_that_is_no_multiple_of_the_patch_is_padded():
    network = TimmFeatures("clip", space("clip", 50), pretrained=False)
    assert network(noise(2, 0))["features"].shape == (2, 64)
    larger = TimmFeatures("clip", space("clip", 64), pretrained=False)
    larger.load_state_dict(network.state_dict())
    whole = torch.nn.functional.interpolate(noise(2, 0).float() / 255, (50, 50), mode="bicubic", antialias=True)
    padded = torch.nn.functional.pad((whole - larger.mean) / larger.std, (0, 14, 0, 14))
    torch.testing.assert_close(network(noise(2, 0))["features"], larger.model.forward_features(padded)[:, 0])


def test_weights_that_are_missing_or_of_another_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("dic_repa.encoders.timm_network.pin", lambda repository: (repository, None))

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return create(name, **options)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match=r"fetch model.safetensors of 'timm/test_vit.* --feature-weights clip=FILE"
    ) as error:
        TimmFeatures("clip", space("clip"))
    assert "\n" not in str(error.value)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors"):
        TimmFeatures("clip", space("clip"), tmp_path / "other.safetensors")


@pytest.fixture
def small_spaces(monkeypatch):
    """All networks of FDr6 small and with random weights, Inception's place taken by one of them."""
    small = {"convnext": "convnext", "dinov2-256": "clip", "mae": "clip", "siglip": "siglip", "clip": "clip"}
    extractors.names()
    entries = {name: partial(TimmFeatures, name, space(kind), pretrained=False) for name, kind in small.items()}

    class Pool(TimmFeatures):
        layers = ("pool",)

        def forward(self, images):
            return {"pool": super().forward(images)["features"]}

    entries["inception"] = lambda: Pool("inception", space("clip"), pretrained=False)
    for name, entry in entries.items():
        monkeypatch.setitem(extractors._entries, name, entry)


def test_fdr6_is_the_mean_ratio_of_six_distances(small_spaces):
    samples, reference, held = noise(20, 1), noise(24, 2) // 2, noise(20, 3) // 2
    measure = Measure(["fdr6", "fdr6-imagenet"], reference, bound=held, cache=False)
    measured, ratios = measure([samples]), []
    for name in SIX:
        network, _, layer = metrics.create(name).layer.partition(".")
        found = [statistics(measure.extractors[network](part)[layer]) for part in (samples, held, reference)]
        far, near = (frechet_distance(*part, *found[2]) for part in found[:2])
        assert measured.values[name] == pytest.approx(far, rel=1e-3)
        ratios.append(far / near)
    assert measured.values["fdr6"] == pytest.approx(np.mean(ratios), rel=1e-3)
    assert measured.real.values["fdr6"] == 1
    # The published distances of the validation images: arXiv 2604.28190's code, and RAEv2's.
    published = {"fid": 1.68, "fd-convnext": 56.87, "fd-dinov2-256": 14.19, "fd-mae": 0.04, "fd-siglip": 0.60}
    expected = [measured.values[name] / value for name, value in {**published, "fd-clip": 5.60}.items()]
    assert measured.values["fdr6-imagenet"] == pytest.approx(np.mean(expected))


def test_a_ratio_of_any_spaces():
    one = [noise(40 + i, i, channels=1) for i in range(3)]
    judge = Judge(["fdr:digits"], one[1], bound=one[2])
    scores = judge(one[0] / 255, torch.zeros(40, dtype=torch.long))
    assert judge.main == "fdr:digits"
    assert judge.better["fd-digits"] == "lower"
    assert scores["fdr:digits"] == pytest.approx(scores["fd-digits"] / scores["reference"]["fd-digits"])
    assert title("fdr:digits") == "FDr (digits)"
    assert title("fdr:theirs") == "fdr:theirs"  # of another's record
    assert find_metric("fdr:") is None


@pytest.mark.parametrize(
    ("names", "bound", "message"),
    [
        (["fdr6"], None, "fdr6 divides by what held-out real images score: name some by --bound"),
        (["fdr:digit"], None, "unknown feature space 'digit'; did you mean digits"),
        (["fdr:digits"], noise(50, 1, channels=1), "fdr:digits: the bound is the reference itself"),
    ],
)
def test_ratios_that_cannot_be(names, bound, message):
    real = noise(50, 1, channels=1)
    with pytest.raises(UserError, match=message) as error:
        Measure(names, real, bound=bound, cache=False)([noise(50, 2, channels=1)])
    assert "\n" not in str(error.value)
