"""Encoders that are no ViTs: their tokens against timm's own `features_only`."""

from __future__ import annotations

from importlib import resources

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from dic_repa.alignment.cache import encoder_hash
from dic_repa.encoders import create_encoder, encoder_card
from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import DINOv2

NAMED = {"efficientnet-lite0": "tf_efficientnet_lite0", "efficientnet-lite2": "tf_efficientnet_lite2"}
SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}  # its maps are NHWC

# timm's name, options, layers, size of the images
FAMILIES = [
    ("test_efficientnet", {}, (0, 3, -1), (45, 70)),
    ("test_convnext", {}, (1, -1), (67, 96)),
    ("test_resnet", {}, (0, 2), (33, 47)),
    ("mobilenetv3_small_050", {}, (3,), (51, 64)),
    ("swin_tiny_patch4_window7_224", SWIN, (0, 2, -1), (64, 100)),
    ("swinv2_tiny_window8_256", SWIN, (1,), (64, 64)),
    ("coatnet_pico_rw_224", {"img_size": 64}, (1, 3), (64, 64)),  # convolutions, then attention
]


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


def save_weights(name: str, path, **options):
    """Random weights with statistics as if trained: a new norm is the identity, which would hide whether it is run."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    state = {key: v + 0.2 * torch.rand_like(v) if v.is_floating_point() else v for key, v in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, path)


@pytest.mark.parametrize(("name", "options", "layers", "size"), FAMILIES)
def test_tokens_equal_timms_features(name, options, layers, size, tmp_path):
    save_weights(name, tmp_path / "weights.safetensors", **options)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    overlay = {"file": str(tmp_path / "weights.safetensors")}
    strict = {"strict_img_size": False} if "swin" in name else {}
    for layer in layers:
        encoder = create_encoder(f"timm:{name}", weights=tmp_path / "weights.safetensors", layer=layer, **options)
        model = timm.create_model(
            name,
            features_only=True,
            out_indices=(layer,),
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **strict,
            **options,
        ).eval()
        mean, std = (torch.tensor(encoder.model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            (features,) = model((images - mean) / std)
        features = features.movedim(-1, 1) if str(getattr(model, "output_fmt", "")).endswith("NHWC") else features
        assert encoder.token_grid(size) == tuple(features.shape[-2:])
        assert encoder.embed_dim == features.shape[1]
        torch.testing.assert_close(encoder(images), features.flatten(2).mT, rtol=1e-5, atol=1e-5)


def test_grids_of_any_size_are_those_of_the_tokens():
    whole = sum(p.numel() for p in create_encoder("timm:test_resnet", pretrained=False).parameters())
    encoder = create_encoder("timm:test_resnet", pretrained=False, layer=1)
    assert sum(p.numel() for p in encoder.parameters()) < whole / 2  # what comes later is not there
    for size in [(1, 1), (17, 32), (31, 33), (64, 65)]:
        h, w = encoder.token_grid(size)
        assert encoder(torch.rand(1, 3, *size)).shape == (1, h * w, encoder.embed_dim)


def test_input_size_is_that_of_the_shorter_side(images):
    encoder = create_encoder("timm:test_resnet", pretrained=False, layer=2, input_size=48)
    plain = create_encoder("timm:test_resnet", pretrained=False, layer=2)
    plain.model.load_state_dict(encoder.model.state_dict())
    wide = images[:, :, :24]
    assert encoder.token_grid((24, 32)) == plain.token_grid((48, 64))
    torch.testing.assert_close(encoder(wide), plain(F.interpolate(wide, (48, 64), mode="bicubic").clamp(0, 1)))
    # Larger pictures are made smaller as picture programs do it: fine stripes become grey.
    stripes = torch.arange(190).remainder(2).expand(1, 3, 190, -1).float()
    torch.testing.assert_close(encoder(stripes), plain(torch.full((1, 3, 48, 48), 0.5)), rtol=0, atol=0.1)


def test_it_stays_frozen(images):
    encoder = create_encoder("timm:test_efficientnet", pretrained=False)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    tokens = nn.ModuleList([encoder]).train()[0](images.requires_grad_())
    assert not tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert any(key.endswith("num_batches_tracked") for key in before)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    torch.testing.assert_close(encoder(images[:, :1]), encoder(images[:, :1].repeat(1, 3, 1, 1)))


def test_weights_without_counters_and_classifier_or_of_processes_fit(tmp_path, images):
    save_weights("test_resnet", tmp_path / "weights.safetensors")
    expected = create_encoder("timm:test_resnet", weights=tmp_path / "weights.safetensors")(images)
    state = load_file(tmp_path / "weights.safetensors")
    state = {
        key: v for key, v in state.items() if not key.endswith("num_batches_tracked") and not key.startswith("fc.")
    }
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "weights.pth")
    torch.testing.assert_close(create_encoder("timm:test_resnet", weights=tmp_path / "weights.pth")(images), expected)
    with pytest.raises(UserError, match=r"missing: .*; \d+ left over: conv1"):
        create_encoder("timm:test_efficientnet", weights=tmp_path / "weights.pth")


def test_its_hash_tells_weights_and_options_apart(tmp_path):
    save_weights("test_resnet", tmp_path / "weights.safetensors")

    def hashed(**options):
        return encoder_hash("x", {}, create_encoder("timm:test_resnet", **options)).hexdigest()

    trained = hashed(weights=tmp_path / "weights.safetensors")
    assert trained == hashed(weights=tmp_path / "weights.safetensors")
    assert (
        len({trained, hashed(pretrained=False), hashed(weights=tmp_path / "weights.safetensors", mean=(0, 0, 0))}) == 3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 9}, "layer 9 does not exist: the encoder has 5 stages, 0 to 4 or -1 to -5"),
        ({"layer": "last"}, "layer takes a whole number, not 'last'"),
        ({"input_size": 0}, "input_size must be at least 1, not 0"),
        ({"pixels_per_token": 8}, "pixels_per_token"),
        ({"out_indices": [1]}, "out_indices is not passed on; the layer says"),
        ({"pretrained_cfg_overlay": {"file": "x"}}, "may unpickle a file; give --weights FILE"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError) as error:
        create_encoder("timm:test_resnet", **{"pretrained": False, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_score_by_the_class_token_refuses_one_that_is_not_computed():
    with pytest.raises(UserError, match="has no class token; choose a DINOv2"):
        DINOv2(encoder="timm:beit_base_patch16_224", pretrained=False, depth=1, embed_dim=48, num_heads=3)


def test_sizes_that_the_network_does_not_take():
    encoder = create_encoder("timm:coatnet_pico_rw_224", pretrained=False)
    with pytest.raises(UserError, match=r"does not take images of 64x64 pixels .*; set input_size, .* 224x224"):
        encoder.token_grid((64, 64))


def test_a_network_without_shapes_in_memory_has_a_grid():
    with torch.device("meta"):  # as the dry run builds it
        encoder = create_encoder("timm:test_convnext", pretrained=False, layer=1)
    assert encoder.token_grid((64, 80)) == (8, 10)


def test_an_unreachable_hub_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.safetensors of 'timm/resnet18\.a1_in1k'.*--weights FILE"):
        create_encoder("timm:resnet18.a1_in1k")


def test_weights_of_the_hub_are_taken_at_a_pinned_commit(monkeypatch, images):
    trained, asked = timm.create_model("resnet10t").eval(), []
    monkeypatch.setattr("dic_repa.encoders.timm_network.pin", lambda repository: (repository, "0123abc"))
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf",
        lambda place, *_, **__: asked.append(place) or trained.state_dict(),
    )
    encoder = create_encoder("timm:resnet10t.c3_in1k", layer=4)
    assert asked == ["timm/resnet10t.c3_in1k@0123abc"]
    with torch.no_grad():
        features = trained.forward_features(encoder.normalise(images))
    torch.testing.assert_close(encoder(images), features.flatten(2).mT, rtol=1e-5, atol=1e-5)
