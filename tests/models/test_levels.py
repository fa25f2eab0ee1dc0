"""DiC for other latents than 4x32x32: other levels, strides, a bottleneck and a wide head, written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dic_repa.alignment import suggest_taps
from dic_repa.errors import UserError
from dic_repa.models import DiC, create_denoiser, measure_cost
from dic_repa.models.authors import authors_state_dict
from dic_repa.models.registry import preset_latent
from dic_repa.recipe import Recipe
from dic_repa.training.optimizers import hidden_matrices
from dic_repa.training.start import start_from

HEAD = {"width": 12, "depth": 2}
ALL = {"strides": (1,), "stem_bottleneck": 2, "wide_head": HEAD}


def small(depths=(2, 1, 2), seed=0, **options) -> DiC:
    torch.manual_seed(seed)
    model = DiC(8, depths, **{"in_channels": 3, "num_classes": 5, **options})
    for parameter in model.parameters():  # the output starts at zero, which would hide everything behind it
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(size=8, channels=3):
    torch.manual_seed(1)
    return torch.randn(2, channels, size, size), torch.rand(2), torch.tensor([2, 5])


def conv(x, layer):
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def last_layers(x, c, output):
    """DiC's: conv, LayerNorm over the channels, modulation, conv."""
    shift, scale = F.linear(c, output.modulation.weight, output.modulation.bias)[..., None, None].chunk(2, 1)
    h = F.layer_norm(conv(x, output.conv1).movedim(1, -1), (x.shape[1],), eps=1e-6).movedim(-1, 1)
    return conv(h * (1 + scale) + shift, output.conv2)


def two_levels(model, x, t, y, down, up, head=lambda noisy, decoded, c: decoded):
    """A DiC of depths (2, 1, 2), whose skip is of its encoder's second block, for its decoder's first."""
    c = [condition(t, y) for condition in model.condition]
    h = skip = model.enc[0][1](model.enc[0][0](conv(model.bottleneck(x), model.stem), c[0]), c[0])
    h = up(conv(model.mid[0](down(conv(h, model.down[0].conv)), c[1]), model.up[0].conv))
    h = model.dec[0][1](model.dec[0][0](torch.cat([h, skip], 1), c[0]), c[0])
    return last_layers(head(x, h, c[0]), c[0], model.output)


def test_dics_own_tensors_have_the_names_that_they_had():
    def both(*layers):
        return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]

    block, joins = both("norm1", "conv1", "modulation", "norm2", "conv2"), both("shortcut")
    times = both("time1", "time2")
    expected = {"stem.weight", "stem.bias", *(f"down.{i}.conv.weight" for i in (0, 1)), "up.0.conv.weight"}
    expected |= {"up.1.conv.weight", *(f"condition.{i}.{name}" for i in range(3) for name in [*times, "label.weight"])}
    expected |= {f"{stage}.{name}" for stage in ("enc.0.0", "enc.0.1", "enc.1.0", "mid.0") for name in block}
    expected |= {f"{stage}.{name}" for stage in ("dec.0.0", "dec.0.1", "dec.1.0") for name in block}
    expected |= {f"{stage}.{name}" for stage in ("dec.0.0", "dec.1.0") for name in joins}
    expected |= {*both("output.conv1", "output.modulation", "output.conv2")}
    model = small((2, 1, 1, 1, 2))
    assert set(model.state_dict()) == expected
    own = "width depths in_channels num_classes learn_sigma time_scale shape skips embedding block patch_size"
    assert set(model.config) == {*own.split()}  # as configs were before there were other levels


def test_two_levels_by_hand():
    model, arguments = small(), inputs()
    expected = two_levels(model, *arguments, lambda x: F.pixel_unshuffle(x, 2), lambda x: F.pixel_shuffle(x, 2))
    torch.testing.assert_close(model(*arguments), expected)
    assert [block.conv2.out_channels for block in model.blocks()] == [8, 8, 16, 8, 8]


def test_a_stride_of_one_and_a_bottleneck_by_hand():
    model, arguments = small(strides=(1,), stem_bottleneck=2), inputs(5)  # any size: nothing is downsampled
    weight = model.bottleneck.weight
    assert weight.shape == (2, 3, 1, 1)
    assert model.bottleneck.bias is None
    torch.testing.assert_close(model(*arguments), two_levels(model, *arguments, lambda x: x, lambda x: x))
    assert model.down[0].conv.weight.shape == (16, 8, 3, 3)
    assert model.up[0].conv.weight.shape == (8, 16, 3, 3)


def test_the_wide_head_by_hand():
    def head(noisy, decoded, c):
        first, second = model.wide_head.blocks
        return second(first(torch.cat([conv(noisy, model.wide_head.stem), decoded], 1), c), c)

    model, arguments = small(strides=(1,), wide_head=HEAD), inputs()
    torch.testing.assert_close(model(*arguments), two_levels(model, *arguments, lambda x: x, lambda x: x, head))


def test_each_level_is_twice_as_wide_and_sized_by_its_stride():
    model, seen = small((1, 2, 1, 1, 2, 1, 1), strides=(2, 1, 2)), []
    for block in model.blocks():
        block.register_forward_hook(lambda _m, _i, output: seen.append(tuple(output.shape[1:])))
    x, t, y = inputs(8)
    assert model(x, t, y).shape == x.shape
    down = [(8, 8, 8), (16, 4, 4), (16, 4, 4), (32, 4, 4)]
    assert seen == [*down, (64, 2, 2), (32, 4, 4), (32, 4, 4), (16, 4, 4), (8, 8, 8)]
    with pytest.raises(UserError, match="divisible by 4, not 6x6"):
        model(x[..., :6, :6], t, y)
    with pytest.raises(UserError, match="divisible by 12, not 8x8"):
        small((1, 1, 1, 1, 1), patch_size=3)(x, t, y)
    assert small((3,))(*inputs(3)).shape == (2, 3, 3, 3)  # one level has no others to skip to


def test_the_head_learns_from_both_inputs_and_begins_at_zero():
    torch.manual_seed(0)
    fresh = DiC(8, (1, 1, 1), in_channels=3, num_classes=5, **ALL)
    assert fresh(*inputs()).abs().max() == 0
    stem = fresh.wide_head.stem.weight.detach()
    assert stem.abs().max() == pytest.approx((6 / (3 * 9 + 12)) ** 0.5, rel=1e-2)  # as the stem's
    noisy, decoded = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4, requires_grad=True)
    head = small(**ALL).wide_head
    head(noisy, decoded, torch.randn(2, 8)).square().sum().backward()
    assert all((each.grad.abs() > 0).all() for each in (noisy, decoded))
    assert all((parameter.grad != 0).any() for parameter in head.parameters())


def test_everything_together(tmp_path):
    """Patches, a variance or a middle head, checkpointed blocks, channels_last, compiled, saved."""
    options = {**ALL, "patch_size": 2, "stem_bottleneck": 4}
    arguments = inputs(8)
    assert small(**options, learn_sigma=True)(*arguments).shape == (2, 6, 8, 8)
    model, formats, gradients = small(**options, middle_head="mid.0"), set(), []
    for block in model.blocks():
        block.register_forward_hook(lambda _m, _i, o: formats.add(o.is_contiguous(memory_format=torch.channels_last)))
    for checkpointing in (False, True):
        model.set_gradient_checkpointing(checkpointing)
        both = model(*arguments)
        gradients.append(torch.autograd.grad(both.square().sum(), list(model.parameters())))
    assert both.shape == (2, 6, 8, 8)
    assert formats == {True}
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()
    compiled = torch.compile(small(**options), backend="eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, both[:, :3], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(DiC.from_pretrained(tmp_path)(*arguments), both)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": ()}, "depths has 0 stages; give an odd number"),
        ({"depths": (1, 1)}, "depths has 2 stages; give an odd number"),
        ({"strides": (1, 2)}, "strides has 2 entries; 3 stages have 1 steps between levels"),
        ({"strides": (3,)}, "strides.0 should be 1 or 2, not 3"),
        ({"strides": (1,), "shape": "isotropic"}, "isotropic resamples nothing: leave them out"),
        ({"stem_bottleneck": 0}, "stem_bottleneck should be greater than or equal to 1, not 0"),
        ({"wide_head": {"width": 12, "dept": 2}}, "unknown key of wide_head 'dept'; did you mean depth"),
        ({"wide_head": {"width": 12}}, "give width and depth, such as {width: 1536, depth: 2}"),
        ({"wide_head": {"width": 12, "depth": 1.5}}, "give width and depth"),
        ({"wide_head": HEAD, "in_channels": 16}, "width 12 is below the 16 channels that it has to pass"),
        ({"wide_head": {"width": 12, "depth": 299}}, "the number of blocks is 304, over the limit of 300"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_too_many_levels_are_one_line():
    with pytest.raises(UserError, match=r"memory for the weights of model 'DiC'|does not take these options"):
        create_denoiser("DiC", 4, 10, width=8, depths=[1] * 59)


def test_the_authors_code_has_three_levels():
    for options in ({"wide_head": HEAD}, {"stem_bottleneck": 2}):
        with pytest.raises(UserError, match=f"no DiC with another {next(iter(options))} than its own"):
            authors_state_dict(small(**options))
    with pytest.raises(UserError, match="depths or strides"):
        authors_state_dict(small())
    with pytest.raises(UserError, match="depths or strides"):
        authors_state_dict(small((1, 1, 1, 1, 1), strides=(2, 1)))


def test_the_middle_is_suggested_where_no_map_is_smaller():
    for strides in ((1,), (2,)):
        assert suggest_taps(small((2, 4, 2), strides=strides), inputs())[0] == "mid.1"


def test_the_heads_stem_is_a_first_layer():
    model = small(**ALL)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {names[id(parameter)] for parameter in hidden_matrices(model)}
    assert {"stem.weight", "wide_head.blocks.0.conv1.weight"} <= chosen
    assert chosen.isdisjoint({"bottleneck.weight", "wide_head.stem.weight", "output.conv2.weight"})


def test_a_run_begins_with_weights_of_other_channels(tmp_path):
    source, ours = small(**ALL), small(**ALL, in_channels=4, seed=1)
    source.save_pretrained(tmp_path)
    recipe = Recipe(train={"init_from": str(tmp_path)})
    start = start_from(ours, ours.conditioned_on, recipe)
    assert {name.rpartition(".")[0] for name in start.fresh} == {"bottleneck", "wide_head.stem", "output.conv2"}
    assert torch.equal(ours.wide_head.blocks[0].conv1.weight, source.wide_head.blocks[0].conv1.weight)
    for other, said in ((small(), "strides"), (small(**{**ALL, "wide_head": None}), "wide_head")):
        with pytest.raises(UserError, match=f"does not fit the recipe's model: it has .*{said}"):
            start_from(other, other.conditioned_on, recipe)


def test_the_preset_for_f32_has_the_stated_size():  # test_recipes_latents.py has the others
    channels, size = preset_latent("DiC-XL/f32")
    with torch.device("meta"):
        cost = measure_cost(create_denoiser("DiC-XL/f32", channels), size)
    assert cost.parameters / 1e6 == pytest.approx(1168.6, abs=0.1)
    assert cost.macs / 1e9 == pytest.approx(64.3, abs=0.1)
    assert preset_latent("DiC-XL") is None
