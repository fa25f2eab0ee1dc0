"""The encoders: tokens against a direct timm computation, what the digit encoder knows, and what is refused."""

from __future__ import annotations

from importlib import resources

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from dic_repa.data.digits import load_digits
from dic_repa.encoders import create_encoder, list_encoders, register_encoder
from dic_repa.errors import UserError
from dic_repa.training.train_digits import main as train_digits

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def digits_vit():
    return create_encoder("digits-vit")


def tokens_of(encoder, images):
    return torch.cat([encoder(part) for part in images.split(500)])


# --- the registry -----------------------------------------------------------------------------------------------------


def test_registering_and_creating(plugin_folder):
    @register_encoder("mine")
    class Mine:
        def __init__(self, width: int = 3):
            self.embed_dim = width

    @register_encoder("family:")
    def build(model_name: str, scale: int = 1):
        return model_name, scale

    assert create_encoder("mine", width=5).embed_dim == 5
    assert create_encoder("family:some:thing", scale=2) == ("some:thing", 2)
    assert {"family:", "mine", "digits-vit"} <= set(list_encoders())
    assert list_encoders("mi*") == ["mine"]
    with pytest.raises(UserError, match="registered already"):
        register_encoder("mine")(lambda: None)
    with pytest.raises(UserError, match=r"unknown option .*'widht'; did you mean width"):
        create_encoder("mine", widht=5)
    with pytest.raises(UserError, match="put a model's name behind the colon"):
        create_encoder("family:")


def test_unknown_names_list_the_near_ones():
    assert {"digits-vit", "timm:"} <= set(list_encoders())
    with pytest.raises(UserError, match="unknown encoder 'digit-vit'; did you mean digits-vit"):
        create_encoder("digit-vit")
    with pytest.raises(UserError, match="vit_small_patch14_dinov2"):
        create_encoder("timm:vit_smal_patch14_dinov2", pretrained=False)
    with pytest.raises(UserError, match="unknown option"):
        create_encoder("digits-vit", layers=1)


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "vit_medium_patch16_gap_256",  # no class token, and a norm of its own behind the pooling
    ],
)
def test_timm_tokens_equal_a_direct_computation(name, images, tmp_path):
    model = timm.create_model(name, num_classes=0, img_size=64, dynamic_img_size=True, **TINY).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = create_encoder(f"timm:{name}", weights=tmp_path / "weights.safetensors", img_size=64, **TINY)

    patch = model.patch_embed.patch_size[0]
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    # One token for 16 pixels, as REPA has it: 64x96 gives 4x6 tokens, and a patch-14 model sees 56x84.
    resized = F.interpolate((images - mean) / std, (4 * patch, 6 * patch), mode="bicubic")
    with torch.no_grad():
        expected = model.forward_features(resized)[:, model.num_prefix_tokens :]

    assert encoder.token_grid((64, 96)) == (4, 6)
    assert encoder.embed_dim == 32
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_timm_layer_and_token_size(images):
    encoder = create_encoder("timm:vit_tiny_patch16_224", pretrained=False, layer=0, pixels_per_token=8, **TINY)
    assert encoder.token_grid((64, 96)) == (8, 12)
    with torch.no_grad():
        resized = F.interpolate((images - 0.5) / 0.5, (128, 192), mode="bicubic")  # this model's mean and std are 0.5
        grid = encoder.model.patch_embed(resized)
        hidden = encoder.model.blocks[0](encoder.model.norm_pre(encoder.model._pos_embed(grid)))
        expected = encoder.model.norm(hidden)[:, 1:]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_grey_images_are_repeated_for_a_colour_model(images):
    encoder = create_encoder("timm:vit_tiny_patch16_224", pretrained=False, **TINY)
    grey = images[:, :1]
    torch.testing.assert_close(encoder(grey), encoder(grey.repeat(1, 3, 1, 1)))


def test_token_grid_of_paper_sizes():
    encoder = create_encoder("timm:vit_small_patch14_dinov2", pretrained=False, **TINY)
    assert encoder.token_grid((256, 256)) == (16, 16)
    assert encoder.token_grid((512, 512)) == (32, 32)
    assert encoder.token_grid((4, 4)) == (1, 1)


def test_dinov2_weights_in_their_own_layout_are_converted(images, tmp_path):
    name = "timm:vit_small_patch14_reg4_dinov2"
    source = create_encoder(name, pretrained=False, img_size=28, **TINY)
    # DINOv2 names the registers otherwise, and has a token for masked patches, for which timm's model has no use.
    state = source.model.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 32)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], dim=1)  # one for the class token too
    torch.save(state, tmp_path / "weights.pth")
    encoder = create_encoder(name, weights=tmp_path / "weights.pth", img_size=28, **TINY)
    torch.testing.assert_close(encoder(images), source(images))


def test_weights_that_do_not_fit_name_their_keys(tmp_path):
    name, path = "timm:vit_tiny_patch16_224", tmp_path / "weights.safetensors"
    state = create_encoder(name, pretrained=False, **TINY).model.state_dict()
    state["head.weight"] = torch.zeros(10, 32)  # a classifier is no part of the encoder
    save_file(state, path)
    create_encoder(name, weights=path, **TINY)

    state["blocks.0.norm1.weight"] = torch.zeros(7)
    state["blocks.9.extra"] = state.pop("blocks.1.norm2.bias")
    save_file(state, path)
    with pytest.raises(UserError) as error:
        create_encoder(name, weights=path, **TINY)
    message = str(error.value)
    assert "missing: blocks.1.norm2.bias" in message
    assert "left over: blocks.9.extra" in message
    assert "blocks.0.norm1.weight is (7,), the model's (32,)" in message
    assert "\n" not in message


def test_files_that_hold_no_weights_are_refused(tmp_path):
    def create(path):
        return create_encoder("timm:vit_tiny_patch16_224", weights=path, **TINY)

    with pytest.raises(UserError, match="no weights at"):
        create(tmp_path / "absent.safetensors")
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(UserError, match=r"cannot be read|not a whole safetensors") as error:
            create(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickled class, which is never loaded
    with pytest.raises(UserError, match="cannot be read"):
        create(tmp_path / "module.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="state_dict"):
        create(tmp_path / "tensor.pth")


def test_a_hub_that_cannot_be_reached_says_what_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"timm/vit_tiny_patch16_224\.augreg.* --weights FILE") as error:
        create_encoder("timm:vit_tiny_patch16_224")
    assert "\n" not in str(error.value)


def test_a_model_without_weights_of_its_own_says_so():
    with pytest.raises(UserError, match=r"No pretrained weights exist.* give --weights FILE .*, or pretrained=False"):
        create_encoder("timm:vit_base_patch16_gap_224", **TINY)


def test_models_without_tokens_are_refused(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: nn.Linear(2, 2))  # as some of timm's models once were
    with pytest.raises(UserError, match=r"neither patch tokens nor feature maps of 'resnet18'"):
        create_encoder("timm:resnet18", pretrained=False)


# --- the digit encoder ------------------------------------------------------------------------------------------------


def test_shipped_weights_are_small():
    weights = resources.files("dic_repa.encoders").joinpath("weights")
    assert sum(len(file.read_bytes()) for file in weights.iterdir()) < 18e6


@pytest.mark.slow
def test_digit_tokens_know_the_class(digits_vit):
    # A linear read-out, solved in closed form on the training digits and judged on those that nothing was trained on.
    def design(split):
        images, labels = load_digits(split)
        features = tokens_of(digits_vit, images).mean(dim=1).double()
        return torch.cat([features, torch.ones(len(features), 1)], dim=1), labels

    x, y = design("train")
    readout = torch.linalg.solve(x.mT @ x + torch.eye(x.shape[1]), x.mT @ F.one_hot(y, 10).double())
    x, y = design("held-out")
    assert ((x @ readout).argmax(dim=1) == y).double().mean() >= 0.98


def test_digit_tokens_of_an_image_stay_apart(digits_vit):
    # The manifold loss compares the tokens of an image with one another: had they collapsed, it would say nothing.
    tokens = F.normalize(digits_vit(load_digits("held-out")[0][:256]), dim=-1)
    cosines = tokens @ tokens.mT
    assert cosines.mean() < 0.9
    assert cosines.std(dim=(1, 2)).mean() > 0.1


def test_digit_encoder_shapes(digits_vit):
    images = load_digits("held-out")[0][:3]
    assert digits_vit.token_grid((28, 28)) == digits_vit.token_grid((16, 20)) == (7, 7)
    tokens = digits_vit(images)
    assert tokens.shape == (3, 49, digits_vit.embed_dim)
    assert torch.equal(tokens, digits_vit(images))
    torch.testing.assert_close(digits_vit(images.repeat(1, 3, 1, 1)), tokens, rtol=1e-4, atol=1e-5)
    assert digits_vit(torch.rand(2, 1, 16, 20)).shape == (2, 49, digits_vit.embed_dim)
    # Row by row: ink in the top right corner moves the last token of the first row most, at the first block.
    blank = torch.zeros(1, 1, 28, 28)
    corner = blank.clone()
    corner[..., :4, -4:] = 1
    early = create_encoder("digits-vit", layer=0)
    assert (early(corner) - early(blank)).norm(dim=-1).argmax() == 6


def test_encoder_stays_frozen(digits_vit):
    images = load_digits("held-out")[0][:2].requires_grad_()
    before = digits_vit(images)
    nn.ModuleList([digits_vit]).train()
    assert not any(module.training for module in digits_vit.modules())
    assert not any(parameter.requires_grad for parameter in digits_vit.parameters())
    after = digits_vit(images)
    assert torch.equal(before, after)
    assert not after.requires_grad


@pytest.mark.parametrize(
    "images", [torch.rand(1, 28, 28), torch.rand(2, 4, 28, 28), torch.zeros(2, 1, 28, 28, dtype=torch.uint8)]
)
def test_bad_images_are_refused(digits_vit, images):
    with pytest.raises(UserError, match=r"float images \(B, 1 or 3, H, W\)"):
        digits_vit(images)


@pytest.mark.parametrize("layer", [9, -9])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(UserError, match=f"layer {layer} does not exist"):
        create_encoder("digits-vit", layer=layer)


def test_training_script_writes_weights_that_the_encoder_takes(tmp_path, monkeypatch):
    digits = {split: tuple(part[:128] for part in load_digits(split)) for split in ("train", "held-out")}
    monkeypatch.setattr("dic_repa.training.train_digits.load_digits", digits.get)
    out = tmp_path / "new" / "weights.safetensors"
    arguments = ["encoder", "--epochs", "1", "--embed-dim", "64", "--depth", "2", "--out", str(out)]
    result = CliRunner().invoke(train_digits, arguments, catch_exceptions=False)
    assert "held-out accuracy" in result.output
    encoder = create_encoder("digits-vit", weights=out)
    assert encoder(digits["train"][0][:2]).shape == (2, 49, 64)

    save_file(load_file(out), out)  # which drops the metadata
    with pytest.raises(UserError, match="no config"):
        create_encoder("digits-vit", weights=out)
