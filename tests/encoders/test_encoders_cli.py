"""`dic-repa encoders` and the picture of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from dic_repa.cli.encoders import command
from dic_repa.encoders.picture import principal_components, token_picture


def invoke(*arguments) -> str:
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False).output


def test_principal_components_are_the_eigenvectors_of_the_covariance():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 6, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 3, 2, 1, 1, 1])
    components = principal_components(tokens)
    values, vectors = np.linalg.eigh(np.cov(tokens.numpy().T))
    expected = (tokens - tokens.mean(0)).numpy() @ vectors[:, ::-1][:, :3]
    np.testing.assert_allclose(np.abs(components.numpy()), np.abs(expected), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(components.var(dim=0).numpy(), values[::-1][:3])
    torch.testing.assert_close(principal_components(-tokens).abs(), components.abs())


def test_two_kinds_of_tokens_have_two_colours():
    tokens = torch.zeros(6, 8)
    tokens[[1, 4]] = 2.0
    picture = token_picture(tokens, (2, 3))
    assert picture.shape == (3, 2, 3)
    torch.testing.assert_close(picture[0], torch.tensor([[0.0, 1, 0], [0, 1, 0]]))
    torch.testing.assert_close(picture[1:], torch.zeros(2, 2, 3))  # there is nothing else to show
    assert token_picture(torch.ones(4, 2), (2, 2)).isfinite().all()


def test_the_list_has_every_family():
    lines = {line.split()[0]: line for line in invoke().splitlines()}
    for family in (
        "dinov2",
        "dinov2reg",
        "dinov3",
        "dino",
        "clip",
        "siglip2",
        "mae",
        "mocov3",
        "pe-core",
        "pe-spatial",
    ):
        assert any(name.startswith(f"{family}-") for name in lines), family
    assert lines["ijepa-vit-h"].split()[1:5] == ["1280", "14", "256", "630.8"]
    assert "CC BY-NC 4.0" in lines["mae-vit-l"]
    assert lines["digits-vit"].split()[1:5] == ["96", "4", "49", "0.2"]
    assert lines["efficientnet-lite0"].split()[1:5] == ["112", "16", "64", "0.7"]
    offline = {name for name, line in lines.items() if line.endswith("works without network")}
    assert offline == {"digits-vit", "efficientnet-lite0", "efficientnet-lite2"}
    assert "timm:" in lines


def test_check_writes_the_image_beside_its_tokens(tmp_path):
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, 45:] = [250, 20, 20]  # the right half is red
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    options = ["depth=2", "embed_dim=32", "num_heads=2"]
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=2, embed_dim=32, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = ["check", "dinov2-vit-s", "--image", tmp_path / "photo.png", "--weights", tmp_path / "weights.pth"]
    arguments += ["--out", tmp_path / "out" / "tokens.png", *(f"--option={option}" for option in options)]
    output = invoke(*arguments)
    assert "256x256 pixels give 16x16 tokens of width 32" in output
    sheet = np.asarray(Image.open(tmp_path / "out" / "tokens.png"))
    assert sheet.shape == (256, 256 + 8 + 256, 3)
    assert (sheet[128, 20] < 5).all()
    assert sheet[128, 250].tolist() == [250, 20, 20]
    cells = sheet[:, 264:].reshape(16, 16, 16, 16, 3)
    assert (cells == cells[:, :1, :, :1]).all()  # one colour for each token


def test_check_of_a_feature_map(tmp_path):
    arguments = ["--size=64", "--option=input_size=96", "--option=layer=2", "--out", tmp_path / "map.png"]
    output = invoke("check", "efficientnet-lite0", *arguments)
    assert "64x64 pixels give 12x12 tokens of width 40" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dinov2-vit-x"], "unknown encoder 'dinov2-vit-x'; did you mean"),
        (["digits-vit", "--image", "absent.png"], "No such file or directory: absent.png"),
        (["digits-vit", "--image", "text.png"], "text.png"),
        (["digits-vit", "--weights", "absent.pth"], "no weights at 'absent.pth'"),
        (["digits-vit", "--option", "layer"], "takes key=value"),
        (["digits-vit", "--option", "layr=1"], "did you mean layer"),
        (["digits-vit", "--option", "layer=["], "--option layer: '[' is not valid YAML"),
        (
            ["digits-vit", "--option", "layer=abc"],
            "'digits-vit': layer takes a whole number or a list of whole numbers, not 'abc'",
        ),
        (["efficientnet-lite0", "--option", "layer=7"], "layer 7 does not exist: the encoder has 5 stages, 0 to 4"),
        (["timm:resnet", "--option", "pretrained=false"], "unknown timm model 'resnet'; did you mean"),
        (
            ["dinov2-vit-s", "--option", "pixels_per_token=abc"],
            "'dinov2-vit-s': pixels_per_token takes a whole number, not 'abc'",
        ),
        (["digits-vit", "--out", "x.foo"], "x.foo is not a picture; end it in .png"),
    ],
)
def test_mistakes(mistake, arguments, message, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    assert message in mistake("encoders", "check", *arguments)
