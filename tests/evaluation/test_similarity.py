"""SSIM and LPIPS against closed forms and the libraries that others take."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity.sample_similarity_lpips as peer
import torchvision
from scipy.ndimage import gaussian_filter

from dic_repa.data.autoencoders import Pixels
from dic_repa.errors import UserError
from dic_repa.evaluation.reconstruction import check_autoencoder
from dic_repa.evaluation.similarity import LPIPS, ssim
from dic_repa.files.weights import read_tensors, save_tensors


def pairs(height: int = 40, width: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    b = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1))
    return a, torch.stack([a[0], (a[1] + 0.1 * b[1]).clamp(0, 1), b[2]])


def test_ssim_of_equal_and_of_plain_images():
    a, b = (torch.full((1, 3, 12, 12), value) for value in (0.2, 0.6))
    torch.testing.assert_close(ssim(*pairs()[:1] * 2), torch.ones(3))
    # Images of one colour have no variance: what is left is the comparison of their means.
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    torch.testing.assert_close(ssim(a, b), torch.tensor([expected]), rtol=1e-4, atol=0)
    with pytest.raises(UserError, match="at least 11 pixels, not 10x11"):
        ssim(a[..., :11, :10], b[..., :11, :10])


def test_ssim_is_the_papers():
    """Its equation 13 with scipy's Gaussian filter, in float64, where the filter sees nothing beyond the border."""
    filtered = partial(gaussian_filter, sigma=1.5, truncate=3.5)  # of 11 values
    for a, b, found in zip(*pairs(), ssim(*pairs())):
        maps = []
        for x, y in zip(a.double().numpy(), b.double().numpy()):
            mean_x, mean_y = filtered(x), filtered(y)
            var_x, var_y = filtered(x * x) - mean_x**2, filtered(y * y) - mean_y**2
            upper = (2 * mean_x * mean_y + 1e-4) * (2 * (filtered(x * y) - mean_x * mean_y) + 9e-4)
            maps.append(upper / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))
        assert found.item() == pytest.approx(np.mean([part[5:-5, 5:-5] for part in maps]), abs=1e-5)
    assert ssim(*pairs())[1] > 0.9 > 0.1 > ssim(*pairs())[2]


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    """A file of random weights under the names of torchvision's file, of which only `features` are there."""
    with torch.device("meta"):
        layers = torchvision.models.vgg16(weights=None).features
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, empty in layers.state_dict().items():
        deviation = (2 / empty[0].numel()) ** 0.5 if empty.ndim > 1 else 0.1
        state[f"features.{name}"] = torch.empty(empty.shape).normal_(0, deviation, generator=generator)
    file = tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors"
    save_tensors(state | {"classifier.0.bias": torch.zeros(2)}, file)
    return file


def test_lpips_is_that_of_torch_fidelity(vgg16, monkeypatch):
    ours = LPIPS(vgg16)
    assert "is not torchvision's file" in ours.notes[0]
    heads = {f"lin{k}.model.1.weight": head for k, head in enumerate(ours.heads)}
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: heads)
    monkeypatch.setattr(peer, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=ours.network))
    theirs = peer.SampleSimilarityLPIPS("lpips")
    levels = [(image * 255).round() for image in pairs(48, 32)]
    expected = theirs(*levels).flatten()
    torch.testing.assert_close(ours(*(image / 255 for image in levels)), expected, rtol=1e-4, atol=1e-6)
    assert expected[0] == 0
    assert expected[2] > expected[1] > 0.001


def test_the_check_of_an_autoencoder_takes_the_file(vgg16):
    class Dark(Pixels):
        def decode(self, x):
            return super().decode(x) / 4

    images = (torch.stack([*pairs(32, 32)[0]]) * 255).byte()
    found = check_autoencoder(Dark(), images, 32, metrics=["fd-digits"], lpips_weights=vgg16)
    expected = LPIPS(vgg16)(images / 255, (images / 4).round() / 255).mean().item()
    assert found.lpips == pytest.approx(expected, rel=1e-3)
    assert "is not torchvision's file" in " ".join(found.notes)
    assert "\nLPIPS" in repr(found)


def test_the_heads_are_those_of_the_authors(vgg16):
    """Whose file torchmetrics has too."""
    if not (found := find_spec("torchmetrics")):  # comes with lightning; importing it takes seconds
        pytest.skip("torchmetrics is not installed")
    theirs = read_tensors(Path(found.origin).parent / "functional/image/lpips_models/vgg.pth")[0]
    assert len(theirs) == 5
    for k, head in enumerate(LPIPS(vgg16).heads):
        torch.testing.assert_close(head.data, theirs[f"lin{k}.model.1.weight"], rtol=0, atol=0)


def test_weights_of_something_else(tmp_path):
    save_tensors({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"VGG16 weights\) does not fit .*26 missing"):
        LPIPS(tmp_path / "other.safetensors")
