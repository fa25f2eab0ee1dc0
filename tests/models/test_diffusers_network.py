"""Models of diffusers as denoisers, against diffusers' own call of the same weights."""

from __future__ import annotations

import copy
import functools
import json

import diffusers
import pytest
import torch
from pages import write_saved_files
from torch import nn

from dic_repa.alignment.taps import tap_shape
from dic_repa.conditions import ClassLabels
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser, load_denoiser
from dic_repa.models.diffusers_network import DiffusersNetwork
from dic_repa.recipe import load_recipe
from dic_repa.recipe.build import build_denoiser
from dic_repa.sampling.convert import convert
from dic_repa.trust import names_code

BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
OPTIONS = {
    "UNet2DModel": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "DiTTransformer2DModel": BLOCKS,
    "PixArtTransformer2DModel": {**BLOCKS, "cross_attention_dim": 16, "caption_channels": 12},
}
# How diffusers itself is told that there are ten classes and the null.
CLASSES = {"UNet2DModel": {"num_class_embeds": 11}, "DiTTransformer2DModel": {"num_embeds_ada_norm": 10}}
LABELS = torch.tensor([0, 3, 10])


def create(kind: str, **options) -> DiffusersNetwork:
    torch.manual_seed(0)
    return create_denoiser(f"diffusers:{kind}", 3, 10, **{**OPTIONS[kind], **options})


@functools.cache
def ready(kind: str) -> DiffusersNetwork:
    """One for all tests that change nothing of it."""
    return create(kind).eval()


def direct(kind: str, **options) -> nn.Module:
    return getattr(diffusers, kind)(in_channels=3, out_channels=3, **OPTIONS[kind], **options)


def inputs(size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, *size, generator=generator), torch.rand(3, generator=generator), LABELS


@pytest.fixture(scope="module", params=OPTIONS)
def model(request):
    """In training mode, as its tests leave it."""
    return create(request.param, time_scale=1000.0).train()


def gradients(model: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad((output * weights).sum(), list(named.values()))))


def test_output_and_gradients_are_those_of_diffusers(model):
    x, t, y = inputs()
    theirs = direct(model.kind, **CLASSES.get(model.kind, {})).eval()  # in training its DiT would drop labels
    theirs.load_state_dict(model.network.state_dict())
    told = {"class_labels": y}
    if model.caption is not None:
        told = {"encoder_hidden_states": model.caption.weight.detach()[y].reshape(3, 1, 12)}
    expected = theirs(x, timestep=1000 * t, **told).sample
    output = model(x, t, y)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    ours = gradients(model, output)
    for name, gradient in gradients(theirs, expected).items():
        torch.testing.assert_close(ours[f"network.{name}"], gradient, rtol=1e-4, atol=1e-4)
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    for name in tables:  # the null class is a row of its own
        seen = ours[f"{name}.weight"].abs().sum(dim=1) > 0
        assert seen.nonzero().flatten().tolist() == LABELS.tolist()
    assert tables


def test_recomputed_gradients_are_the_same(model):
    x, t, y = inputs()
    plain = gradients(model, model(x, t, y))
    model.set_gradient_checkpointing()
    assert model.network.is_gradient_checkpointing
    again = gradients(model, model(x, t, y))
    model.set_gradient_checkpointing(False)
    assert not model.network.is_gradient_checkpointing
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)


def test_saved_and_loaded_it_predicts_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert (config["model"], config["kind"]) == ("DiffusersNetwork", model.kind)
    loaded = load_denoiser(tmp_path / "saved")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(*inputs()), copy.deepcopy(model).eval()(*inputs()), rtol=0, atol=0)
    convert(tmp_path / "saved", tmp_path / "half", "bfloat16")
    half = load_denoiser(tmp_path / "half").state_dict()
    torch.testing.assert_close(half, model.state_dict(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("kind", "tap", "shape"), [
    ("UNet2DModel", "network.mid_block", (16, 4, 4)),
    ("UNet2DModel", "network.down_blocks.0", (8, 4, 4)),
    ("DiTTransformer2DModel", "network.transformer_blocks.1", (16, 4, 4)),
    ("PixArtTransformer2DModel", "network.transformer_blocks.0", (16, 4, 4)),
])  # fmt: skip
def test_a_tap_gives_a_map(kind, tap, shape):
    assert tap_shape(ready(kind), tap, (8, 8)) == shape


def test_sizes():
    unet, dit, pixart = map(ready, OPTIONS)
    for model in (unet, pixart):
        assert model(*inputs((4, 12))).shape == (3, 3, 4, 12)
    assert dit(*inputs((16, 16))).shape == (3, 3, 16, 16)  # its positions are stretched
    for model in (unet, dit, pixart):
        with pytest.raises(UserError, match=rf"this {model.kind} takes heights and widths divisible by 2, not 9x8"):
            model(*inputs((9, 8)))
    with pytest.raises(UserError, match="DiTTransformer2DModel takes squares, not 4x8"):
        dit(*inputs((4, 8)))


def test_the_variance_and_a_middle_head_have_their_channels():
    assert create("PixArtTransformer2DModel", learn_sigma=True)(*inputs()).shape == (3, 6, 8, 8)
    headed = create("UNet2DModel", middle_head="network.mid_block")
    output = headed(*inputs())
    assert output.shape == (3, 6, 8, 8)
    torch.testing.assert_close(output[:, :3], ready("UNet2DModel")(*inputs()))


def test_other_classes_of_diffusers():
    """What takes a sample, a time and labels or a caption is found by its signature."""
    unet = {**OPTIONS["UNet2DModel"], "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    unet |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 12, "attention_head_dim": 2}
    model = create_denoiser("diffusers:UNet2DConditionModel", 3, 10, **unet)
    assert model.caption.weight.shape == (11, 12)
    assert model(*inputs()).shape == (3, 3, 8, 8)
    assert create_denoiser("diffusers:UNet2DModel", 3, 0, **OPTIONS["UNet2DModel"]).conditioned_on.kind == "none"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of diffusers without classes, and one with ten and no null."""
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(3)
    direct("UNet2DModel").save_pretrained(folder / "plain")
    direct("UNet2DModel", num_class_embeds=10).save_pretrained(folder / "pipeline/unet")
    (folder / "no weights").mkdir()
    (folder / "no weights/config.json").write_bytes((folder / "plain/config.json").read_bytes())
    direct("DiTTransformer2DModel", num_embeds_ada_norm=10).save_pretrained(folder / "dit")
    return folder


def test_weights_of_a_folder(folders, tmp_path, capsys):
    unet = diffusers.UNet2DModel.from_pretrained(folders / "plain")
    ours = create_denoiser("diffusers:UNet2DModel", 3, 10, weights=str(folders / "plain"))
    assert ours.config["block_out_channels"] == [8, 16]
    assert "knows no classes; its table of classes starts new" in capsys.readouterr().err
    with torch.no_grad():
        ours.network.class_embedding.weight.zero_()
    x, t, y = inputs()
    torch.testing.assert_close(ours(x, 1000 * t, y), unet(x, 1000 * t).sample)

    source = f"{folders}/pipeline:unet"
    ours = create_denoiser("diffusers:UNet2DModel", 3, 10, weights=source, dropout=0.1)
    unet = diffusers.UNet2DModel.from_pretrained(folders / "pipeline", subfolder="unet")
    assert ours.config["dropout"] == 0.1
    table = unet.class_embedding.weight
    torch.testing.assert_close(ours.network.class_embedding.weight[:10], table)
    assert ours.network.class_embedding.weight.shape == (11, 32)
    ours.save_pretrained(tmp_path / "saved")
    assert load_denoiser(tmp_path / "saved").config == ours.config  # which names no folder


@pytest.mark.parametrize(("kind", "weights", "options", "said"), [
    ("UNet2DModel", "plain", {"block_out_channels": (8, 12)}, r"not fit this UNet2DModel; \d+ of another shape"),
    ("UNet2DModel", "no weights", {}, "does not hold config.json and diffusion_pytorch_model.safetensors of"),
    ("UNet2DModel", "nowhere", {}, "there is no folder .*nowhere; name one, or a hub id, with config.json and"),
    ("UNet2DModel", "dit", {}, "dit holds diffusers' DiTTransformer2DModel; name the model diffusers:DiT"),
])  # fmt: skip
def test_weights_that_do_not_fit(kind, weights, options, said, folders):
    with pytest.raises(UserError, match=said):
        create_denoiser(f"diffusers:{kind}", 3, 10, weights=str(folders / weights), **options)


def test_weights_of_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"cannot be fetched from the hub; download .* from https://huggingface.co/some"
    ):
        create_denoiser("diffusers:UNet2DModel", 3, 10, weights="some/one:unet")


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("UNet2DModl", {}, r"unknown model of diffusers .*'UNet2DModl'; did you mean UNet2DModel"),
    ("DiffusionPipeline", {}, "unknown model of diffusers"),
    ("FluxTransformer2DModel", {}, "is not class-conditional: it takes no class_labels.*some that can: DiT"),
    ("AutoencoderKL", {}, "AutoencoderKL cannot be a denoiser: it takes no timestep; some that can: .*, UNet2DModel"),
    ("", {}, "denoiser 'diffusers:' is a family; put a model's name behind the colon"),
    ("UNet2DModel", {"block_out_chanels": [8]}, "'block_out_chanels'; did you mean block_out_channels"),
    ("UNet2DModel", {"out_channels": 6}, "out_channels follows from the data, .* and learn_sigma; leave it out"),
    ("UNet2DModel", {"norm_num_groups": 5}, "does not take these options: num_channels .* divisible by num_groups"),
    ("UNet2DModel", {"time_embedding_type": "fourier"}, "time_embedding_type must be positional"),
    ("UNet2DModel", {"two_times": True}, "UNet2DModel takes one time"),
    ("UNet2DModel", {"layers_per_block": 10**9}, "layers_per_block is 1,000,000,000, over the limit of 300"),
    ("DiTTransformer2DModel", {"sample_size": 10**6}, "sample_size is 1,000,000, over the limit of 16,384"),
    ("DiTTransformer2DModel", {"norm_eps": "x"}, "does not run with these options"),
    ("PixArtTransformer2DModel", {"cross_attention_dim": None, "caption_channels": None}, "needs caption_channels or"),
    ("PixArtTransformer2DModel", {"learn_sigma": "no"}, "learn_sigma takes true or false"),
])  # fmt: skip
def test_mistakes(kind, options, said):
    with pytest.raises(UserError, match=said):
        create_denoiser(f"diffusers:{kind}", 3, 10, **{**OPTIONS.get(kind, {}), **options})


@pytest.mark.parametrize(("key", "value", "said"), [
    ("kind", "os:system", "names code to run: kind os:system"),
    ("kind", "DiffusionPipeline", "unknown model of diffusers"),
    ("weights", "some/one", "unknown option of diffusers' UNet2DModel: 'weights'"),
    ("act_fn", ["silu"], "does not take these options"),
    ("block_out_channels", [8, 12], "of another shape"),
])  # fmt: skip
def test_a_stranger_s_config_names_models_of_diffusers_only(key, value, said, tmp_path):
    ready("UNet2DModel").save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/manifest.json").unlink()
    file = tmp_path / "saved/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=said):
        load_denoiser(tmp_path / "saved")


def test_a_recipe_that_names_the_family_names_no_code():
    recipe = load_recipe("digits-urepa", ["model={name: 'diffusers:UNet2DModel'}"])
    assert not names_code(recipe.model_dump())
    assert names_code({"model": {"name": "timm:create_model"}})


def test_the_recipe_of_the_page_is_aligned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_saved_files(tmp_path, "my_unet.yaml")
    recipe = load_recipe(tmp_path / "my_unet.yaml")
    with torch.device("meta"):
        model = build_denoiser(recipe.model, 1, ClassLabels(10))
    assert (model.time_scale, tap_shape(model, recipe.alignments[0].tap, (16, 16))) == (1000, (64, 8, 8))


def test_compiled_it_is_the_same():
    model = create("DiTTransformer2DModel", num_layers=1).eval()
    compiled = torch.compile(model, backend="eager", dynamic=False)  # traced as any backend would have it
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-5, atol=1e-6)
