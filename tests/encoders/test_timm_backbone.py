"""Encoders that are no ViTs: their tokens against timm's own `features_only`."""

from __future__ import annotations

from importlib import resources

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from dic_repa.encoders import create_encoder, encoder_card

NAMED = {"efficientnet-lite0": "tf_efficientnet_lite0", "efficientnet-lite2": "tf_efficientnet_lite2"}


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMED)
def test_encoders_of_the_package_equal_timms_features(name, images, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    encoder = create_encoder(name)
    file = resources.files("dic_repa.encoders").joinpath("weights", f"{name.replace('-', '_')}.safetensors")
    stored = load_file(file)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    model = timm.create_model(NAMED[name], features_only=True, out_indices=(3,)).eval()
    model.load_state_dict({key: value.float() for key, value in stored.items()}, strict=False)
    inputs = F.interpolate(images, (128, 128), mode="bicubic").clamp(0, 1) * 2 - 1
    with torch.no_grad():
        (features,) = model(inputs)
    card = encoder_card(name)
    assert encoder.token_grid((32, 32)) == tuple(features.shape[-2:]) == (8, 8)
    assert encoder.embed_dim == features.shape[1] == card.width
    assert encoder.token_grid((256, 256)) == (card.tokens**0.5, card.tokens**0.5)
    assert card.patch == 128 // 8
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(card.parameters, abs=0.06)
    tokens = encoder(images)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, features.flatten(2).mT, rtol=1e-5, atol=1e-5)
