"""DiC against the authors' reference values, the papers' table, and its own promises."""

from __future__ import annotations

import argparse

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.models import DiC, load_authors_checkpoint, measure_cost

CHECKPOINT = DATA / "authors_dic_tiny.safetensors"


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "authors_dic_tiny_io.safetensors")


def small(**options) -> DiC:
    torch.manual_seed(0)
    model = DiC(**{"width": 8, "depths": (2, 2, 2, 2, 2), "in_channels": 3, "num_classes": 5} | options)
    for parameter in model.parameters():  # the output starts at zero, which would hide everything behind it
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(height=16, width=16, channels=3, batch=2):
    return torch.randn(batch, channels, height, width), torch.rand(batch), torch.arange(batch) % 6


def test_authors_checkpoint_gives_the_authors_output(reference):
    model = load_authors_checkpoint(CHECKPOINT)
    assert model.config["depths"] == [4, 3, 2, 3, 4]
    assert model.config["width"] == 8
    assert model.config["num_classes"] == 10
    assert not model.config["learn_sigma"]
    tapped = []
    model.mid[0].register_forward_hook(lambda _m, _i, output: tapped.append(output))
    with torch.no_grad():
        out = model(reference["x"], reference["t"], reference["y"])
    assert (out - reference["out"]).norm() <= 1e-5 * reference["out"].norm()
    torch.testing.assert_close(tapped[0], reference["mid_after_block_1"], rtol=1e-5, atol=5e-6)


def test_authors_checkpoint_inside_a_torch_file(tmp_path, reference):
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": {}, "ema": load_file(CHECKPOINT), "args": argparse.Namespace(model="DiC-S")}, file)
    model = load_authors_checkpoint(file)
    with torch.no_grad():
        out = model(reference["x"], reference["t"], reference["y"])
    assert (out - reference["out"]).norm() <= 1e-5 * reference["out"].norm()


def test_authors_checkpoint_bad_input(tmp_path):
    state = load_file(CHECKPOINT)
    with pytest.raises(UserError, match="not a checkpoint of the DiC authors' code"):
        load_authors_checkpoint({"weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"missing: enc\.0\.1\.conv1\.weight"):
        load_authors_checkpoint({k: v for k, v in state.items() if k != "enc_blocks.0.1.conv.conv0.weight"})
    wrong = state | {"lat_blocks.0.1.conv.conv1.weight": torch.zeros(32, 32, 1, 1)}
    with pytest.raises(UserError, match=r"mid.1.conv2.weight is \(32, 32, 1, 1\), the model's \(32, 32, 3, 3\)"):
        load_authors_checkpoint(wrong)
    half = tmp_path / "half.safetensors"
    half.write_bytes(CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_authors_checkpoint(half)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"ema": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="cannot be read as a file of plain tensors"):
        load_authors_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at32", "at64"), [("DiC-XL", "57.2", "228.7"), ("DiC-H", "97.2", "388.4")])
def test_winograd_counts_are_the_papers(name, at32, at64):
    with torch.device("meta"):
        model = DiC.from_preset(name, in_channels=4, num_classes=1000, learn_sigma=True)
    assert [f"{measure_cost(model, size).winograd_macs / 1e9:.1f}" for size in (32, 64)] == [at32, at64]


@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 3), (4, 12, 1), (20, 8, 5)])
def test_any_size_and_channel_count(height, width, channels):
    model = small(in_channels=channels)
    x, t, y = inputs(height, width, channels)
    assert model(x, t, y).shape == x.shape


def test_patches_are_torchs_pixel_unshuffle_around_the_model():
    torch.manual_seed(0)
    options = {"width": 16, "depths": (1, 1, 1, 1, 1), "num_classes": 3, "learn_sigma": True}
    patched, plain = DiC(in_channels=3, patch_size=2, **options), DiC(in_channels=12, **options)
    torch.nn.init.normal_(patched.output.conv2.weight)
    plain.load_state_dict(patched.state_dict())
    x, t, y = torch.randn(2, 3, 16, 24), torch.rand(2), torch.tensor([1, 3])
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t, y), 2)
    torch.testing.assert_close(patched(x, t, y), expected, rtol=0, atol=0)
    assert expected.shape == (2, 6, 16, 24)
    with pytest.raises(UserError, match="divisible by 8"):
        patched(torch.zeros(1, 3, 12, 12), t[:1], y[:1])
    with pytest.raises(UserError, match="patch_size"):
        DiC(in_channels=3, patch_size=0, **options)


def test_learn_sigma_doubles_the_output():
    assert small(learn_sigma=True)(*inputs()).shape == (2, 6, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 6)])
def test_a_size_that_does_not_divide_is_refused(height, width):
    with pytest.raises(UserError, match=f"divisible by 4, not {height}x{width}"):
        small()(*inputs(height, width))


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="did you mean DiC-XL"):
        DiC.from_preset("DiC-XLL")
    with pytest.raises(UserError, match="depths has 4 stages; give an odd number"):
        DiC(8, (1, 1, 1, 1))
    with pytest.raises(UserError, match="even number"):
        DiC(7, (1, 1, 1, 1, 1))
    with pytest.raises(UserError, match="needs 2 skips, its encoder stage gives 1"):
        DiC(8, (1, 1, 1, 1, 4))


def test_block_is_what_the_paper_says():
    """One block written out with torch's functions: norm, GELU, conv, norm, modulate, GELU, conv, gate, residual."""
    block = small().mid[0]
    x, c = torch.randn(2, 32, 8, 8), torch.randn(2, 32)
    h = F.conv2d(F.gelu(F.group_norm(x, 8, block.norm1.weight, block.norm1.bias, 1e-5)), block.conv1.weight,
                 block.conv1.bias, padding=1)  # fmt: skip
    gate, scale, shift = F.linear(c, block.modulation.weight, block.modulation.bias).view(2, 3, 32, 1, 1).unbind(1)
    h = F.group_norm(h, 8, block.norm2.weight, block.norm2.bias, 1e-5) * (1 + scale) + shift
    expected = x + gate * F.conv2d(F.gelu(h), block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x, c), expected)


def test_starts_from_the_authors_initial_values():
    torch.manual_seed(0)
    model = DiC(width=64, depths=(2, 2, 2, 2, 2), num_classes=100)
    assert model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([3])).abs().max() == 0
    conv = model.mid[0].conv1.weight
    assert conv.detach().abs().max() == pytest.approx((6 / (256 * 9 * 2)) ** 0.5, rel=1e-3)  # Xavier uniform
    assert model.stem.weight.detach().abs().max() == pytest.approx((6 / (4 * 9 + 64)) ** 0.5, rel=1e-2)
    assert model.condition[2].label.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    assert model.condition[2].time1.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    assert model.mid[0].modulation.weight.detach().abs().max() > 0  # not zeroed, as in the authors' code
    gated = DiC(width=8, depths=(2, 2, 2, 2, 2), zero_gates=True)
    x, c = torch.randn(1, 32, 4, 4), torch.randn(1, 32)
    torch.testing.assert_close(gated.mid[1](x, c), x)


def test_gradient_checkpointing_changes_no_gradient_and_fires_taps_once():
    model, arguments = small(), inputs()
    fired = []
    model.mid[0].register_forward_hook(lambda *_: fired.append(1))
    gradients = []
    for checkpointing in (False, True):
        model.set_gradient_checkpointing(checkpointing)
        model.zero_grad()
        model(*arguments).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(fired) == 2
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)


def test_runs_in_channels_last():
    model = small()
    formats = []
    for block in model.blocks():
        block.register_forward_hook(
            lambda _m, _i, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    model(*inputs())
    assert all(formats)


def test_save_and_load(tmp_path):
    model = small(time_scale=1000.0)
    model.save_pretrained(tmp_path / "model")
    again = DiC.from_pretrained(tmp_path / "model")
    arguments = inputs()
    torch.testing.assert_close(again(*arguments), model.eval()(*arguments), rtol=0, atol=0)
    assert not again.training


def test_loading_what_does_not_fit_says_why(tmp_path):
    small().save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()  # else the change is told first
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"width": 8', '"width": 16'))
    with pytest.raises(UserError, match=r"stem.weight is \(8, 3, 3, 3\), the model's \(16, 3, 3, 3\)"):
        DiC.from_pretrained(tmp_path)
    save_file({"stem.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing: "):
        DiC.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"it has no model\.safetensors"):
        DiC.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="there is no model folder"):
        DiC.from_pretrained("./nowhere")


def test_hub_that_cannot_be_reached(monkeypatch):
    def refuse(*_, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"no route.*download config.json and model.safetensors"):
        DiC.from_pretrained("someone/dic-xl")
