"""DiCo and FCDM against their authors' code: output, gradients, layout; and as parts of the library."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser, load_authors_checkpoint, load_denoiser, presets
from dic_repa.models.authors import authors_state_dict
from dic_repa.recipe import load_recipe

FAMILIES = ("DiCo", "FCDM")
VECTOR = {"kind": "vector", "dim": 3, "null": "learnt"}
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def references():
    """Of each family a small model of random weights in the layout of its code, what that code gave and gradients."""
    return {family: load_file(DATA / f"authors_{family.lower()}_tiny.safetensors") for family in FAMILIES}


def weights(reference, prefix="model.") -> dict:
    return {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}


def small(family, classes=5, **options):
    options = {"width": 4, "depths": (1, 2, 2, 1, 2), "learn_sigma": True, **options}
    return create_denoiser(family, 4, classes, **options)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def with_gradients(model, reference):
    """The output, and the gradients that the reference has, by name."""
    x = reference["x"].clone().requires_grad_()
    out = model(x, reference["t"], reference["y"])
    (out * reference["weight"]).sum().backward()
    return out.detach(), {"x": x.grad, **{key: parameter.grad for key, parameter in model.named_parameters()}}


@each_family
def test_outputs_and_gradients_are_the_authors(references, family):
    reference = references[family]
    model = load_authors_checkpoint({f"module.{key}": value for key, value in weights(reference).items()})
    assert model.config == small(family).config
    out, gradients = with_gradients(model, reference)
    close(out, reference["out"])
    close(gradients.pop("x"), reference["grad.x"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(gradients[key])
    theirs = weights(reference, "grad.model.")
    ours = authors_state_dict(model)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        close(gradient, theirs[key])


@each_family
def test_a_file_there_and_back_is_the_same_to_the_bit(references, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def convert(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["convert", *arguments])
        assert exit.value.code == 0

    theirs = weights(references[family])
    torch.save({"ema": theirs, "model": {}}, "theirs.pt")
    convert("theirs.pt", "ours")
    convert("ours", "again.safetensors")
    again = load_file("again.safetensors")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], value) for key, value in theirs.items())
    assert type(load_denoiser("ours")).__name__ == family


def test_what_is_no_checkpoint_of_theirs(references):
    theirs = weights(references["FCDM"])
    with pytest.raises(UserError, match=r"not a whole checkpoint of FCDM: it has no x_embedder\.weight"):
        load_authors_checkpoint({key: value for key, value in theirs.items() if key != "x_embedder.weight"})
    # Weights of another preset, which is what other arguments than those read off the tensors make of them.
    with pytest.raises(UserError, match=r"mlp1\.weight is \(12, 4, 1, 1\), the model's \(8, 4, 1, 1\)"):
        load_authors_checkpoint(theirs, mlp_ratio=2)
    with pytest.raises(UserError, match=r"the DiCo authors' code has no DiCo with condition\.0\.span"):
        authors_state_dict(small("DiCo", two_times=True))
    with pytest.raises(UserError, match="no FCDM with a condition other than classes"):
        authors_state_dict(small("FCDM", 0, condition=VECTOR))


@each_family
def test_saved_with_every_option_it_is_the_same(family, tmp_path):
    options = {"learn_sigma": False, "two_times": True, "middle_head": "mid.1", "condition": VECTOR}
    model = small(family, 0, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "saved")
    x, t, y = torch.randn(2, 4, 4, 8), torch.rand(2, 2), torch.randn(2, 3)
    with torch.no_grad():
        out = model(x, t, y)
        assert out.shape == (2, 8, 4, 8)  # the model's own, and the head's
        assert torch.equal(load_denoiser(tmp_path / "saved")(x, t, y), out)


@each_family
def test_checkpointed_it_is_the_same(references, family):
    reference = references[family]
    model = load_authors_checkpoint(weights(reference))
    out, gradients = with_gradients(model, reference)
    model.zero_grad()
    model.set_gradient_checkpointing()
    again, recomputed = with_gradients(model, reference)
    assert torch.equal(again, out)
    assert all(torch.equal(recomputed[key], gradient) for key, gradient in gradients.items())


@torch.no_grad()
def test_compiled_it_is_the_same():
    def random(module):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return module

    # They share all but their blocks, and a whole model takes seconds.
    whole, block = random(small("FCDM", depths=(1, 1, 1, 1, 1))), random(small("DiCo")).mid[0]
    inputs = torch.randn(2, 4, 8, 4), torch.rand(2), torch.tensor([1, 5])
    close(torch.compile(whole, backend="aot_eager")(*inputs), whole(*inputs))
    x, c = torch.randn(2, 16, 4, 4), torch.randn(2, 16)
    close(torch.compile(block, backend="aot_eager")(x, c), block(x, c))


@each_family
def test_taps_and_layout(family):
    model = small(family)
    shapes, layouts = {}, []
    for name in ("enc.0.0", "enc.1.1", "mid.0", "dec.1.0", "dec.0.1"):

        def look(_module, _inputs, output, name=name):
            shapes[name] = tuple(output.shape[1:])
            layouts.append(output.is_contiguous(memory_format=torch.channels_last))

        model.get_submodule(name).register_forward_hook(look)
    model(torch.randn(2, 4, 8, 16), torch.rand(2), torch.tensor([0, 5]))
    last = 8 if family == "DiCo" else 4  # DiCo's last stage stays as wide as level 1
    expected = {"enc.0.0": (4, 8, 16), "enc.1.1": (8, 4, 8), "mid.0": (16, 2, 4), "dec.1.0": (8, 4, 8)}
    assert shapes == {**expected, "dec.0.1": (last, 8, 16)}
    assert all(layouts)
    with pytest.raises(UserError, match=rf"{family} takes heights and widths divisible by 4, not 8x10"):
        model(torch.randn(2, 4, 8, 10), torch.rand(2), torch.tensor([0, 5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 5}, "width must be an even number, not 5"),
        ({"depths": (1, 1, 1)}, "DiCo: depths"),
        ({"mlp_ratio": 0}, "DiCo: mlp_ratio"),
        ({"skips": "dense"}, "unknown option of denoiser 'DiCo': 'skips'"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(UserError, match=message):
        small("DiCo", **options)


@each_family
def test_the_recipe_with_urepa_has_the_preset_s_sizes_and_taps_its_middle(family):
    recipe, sizes = load_recipe(f"{family.lower()}-xl-urepa"), presets.PRESETS[f"{family}-XL"].options
    assert (recipe.model.width, recipe.model.depths) == (sizes["width"], sizes["depths"])
    assert presets.FAMILIES[family].options == {"mlp_ratio": sizes["mlp_ratio"]}
    (alignment,) = recipe.alignments
    before = sum(sizes["depths"][:2]) + 1 + int(alignment.tap.removeprefix("mid."))
    assert before == sum(sizes["depths"]) // 2


@each_family
def test_new_blocks_are_the_identity_and_the_output_is_zero(family):
    model = small(family)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(model.enc[1][0](x, torch.randn(2, 8)), x)
    assert not model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 5])).any()
