"""Exported models: what a file or folder computes, opened by its own runtime, is what the model computes.

DiC in all three forms is in tests/test_snippets.py, by docs/export.md.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from pictures import save_vae
from small_runs import full_disk
from tiny_autoencoders import save_kind
from torch import nn

from dic_repa.conditions import VectorCondition, class_labels
from dic_repa.data.autoencoders import load_autoencoder, load_spec
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError
from dic_repa.export import export
from dic_repa.models import Pretrained, create_denoiser
from dic_repa.recipe import load_training_recipe
from dic_repa.sampling.load import Checkpoint

VECTOR = {"kind": "vector", "dim": 3, "null": "learnt"}
FAMILIES = {
    "SiT": {"width": 16, "depth": 1, "num_heads": 2, "learn_sigma": True},
    "DiT-LLaMA": {"width": 16, "depth": 1, "num_heads": 2},
    "U-ViT": {"width": 16, "depth": 3, "num_heads": 2, "size": 8},
    "DiC": {"width": 8, "depths": (1, 1, 1, 1, 1), "condition": VECTOR},
}


def model_of(denoiser: Pretrained, *overrides: str, autoencoder: str = "none") -> Checkpoint:
    """A checkpoint of random weights, since new ones predict zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    recipe = load_training_recipe("digits-urepa", ["data.size=8", "objective.options={}", *overrides])
    vector = VectorCondition(3) if denoiser.num_classes == 0 else None
    saved = SavedData(load_spec(autoencoder), vector or class_labels(5, "abcde"))
    return Checkpoint(denoiser.eval(), recipe, Path("nowhere"), saved)


def small(family: str, *overrides: str, channels: int = 3, **options) -> Checkpoint:
    options = FAMILIES[family] | options
    return model_of(create_denoiser(family, channels, 0 if "condition" in options else 5, **options), *overrides)


def inputs(rows: int, vectors: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    y = torch.randn(rows, 3, generator=generator) if vectors else torch.arange(rows) % 6
    if vectors:
        y[0] = torch.nan  # the null
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.rand(rows, generator=generator), y


def assert_close(found, model: Checkpoint, arguments, share: float) -> None:
    with torch.no_grad():
        expected = model.denoiser(*arguments)
    assert (torch.as_tensor(found) - expected).abs().max() <= share * expected.abs().max()
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("family", "dtype", "share"), [("U-ViT", "float32", 1e-5), ("SiT", "float16", 5e-3)]
)  # fmt: skip
def test_onnxruntime_computes_what_the_model_does(family, dtype, share, tmp_path):
    import onnxruntime

    model = small(family, *["objective.name=ddpm"] * (family == "SiT"))
    made = export(model, tmp_path / "out", "onnx", dtype)
    assert made.difference <= made.tolerance
    session = onnxruntime.InferenceSession(made.file)
    for rows in (2, 5):
        x, t, y = arguments = inputs(rows)
        (found,) = session.run(None, {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()})
        assert_close(found, model, arguments, share)
    assert b".py" not in made.file.read_bytes()  # no path of this machine, which a trace holds
    record = json.loads((tmp_path / "out/export.json").read_text())
    steps = (999, 0, "noise", "vp") if family == "SiT" else (1, 0, "velocity", "linear")
    assert (record["t_at_noise"], record["t_at_data"], record["prediction"], record["path"]) == steps
    assert record["class_names"] == list("abcde")


@pytest.mark.parametrize(
    ("family", "dtype", "share"),
    [("DiC", "bfloat16", 5e-2), ("DiT-LLaMA", "float32", 1e-5)],
)
def test_a_torch_program_computes_what_the_model_does(family, dtype, share, tmp_path):
    model = small(family)
    made = export(model, tmp_path / "out", "torch", dtype)
    program = torch.export.load(made.file).module()
    for rows in (2, 5):
        arguments = inputs(rows, vectors=family == "DiC")
        assert_close(program(*arguments), model, arguments, share)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Open a folder as a user of diffusers does; it keeps its copy of the code in tmp_path."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda folder: DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("kind", ["AutoencoderKLFlux2", "AutoencoderDC"])
def test_a_folder_holds_any_autoencoder_of_diffusers(kind, opened, tmp_path):
    """One whose latents are packed, and one without a posterior."""
    if not save_kind(tmp_path / "vae", kind).is_dir():
        pytest.skip("this diffusers does not have it")
    autoencoder = load_autoencoder(str(tmp_path / "vae"))
    model = small("SiT", channels=autoencoder.spec.channels)
    model.data = SavedData(autoencoder.spec, class_labels(5, "abcde"))
    export(model, tmp_path / "out", "diffusers")
    asked = {"num_inference_steps": 2, "output_type": "pt"}
    pipeline = opened(tmp_path / "out")
    x = pipeline("b", generator=torch.manual_seed(0), **asked | {"output_type": "latent"}).images
    image = pipeline("b", generator=torch.manual_seed(0), **asked).images
    assert torch.as_tensor(image).std() > 1e-3
    torch.testing.assert_close(torch.as_tensor(image), autoencoder.decode(torch.as_tensor(x)), atol=1e-5, rtol=0)


def test_diffusers_samples_as_the_model_does(opened, tmp_path):
    vae = save_vae(tmp_path / "vae", scaling_factor=0.02)  # for images that differ visibly
    model = small("SiT", "objective.name=contrastive-flow-matching", channels=4)  # guided by the data's mean
    model.data = SavedData(load_autoencoder(str(vae)).spec, class_labels(5, "abcde"), torch.full((4, 8, 8), 9.0))
    export(model, tmp_path / "out", "diffusers")
    keys = {"solver": "heun", "steps": 3, "guidance": {"scale": 2.0, "interval": (0.1, 0.8)}, "seed": 3}
    expected = [np.asarray(image) for image in model.sample(["b", 4, None], **keys)]
    noise = torch.stack(
        [torch.from_numpy(np.random.Generator(np.random.Philox(key=[k, 3])).standard_normal((4, 8, 8), np.float32))
         for k in range(3)]
    )  # fmt: skip
    asked = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.1, 0.8), "solver": "heun"}
    pipeline = opened(tmp_path / "out")
    images = pipeline(["b", 4, None], latents=noise, **asked).images
    assert min(np.ptp(np.stack(pair).astype(int), axis=0).max() for pair in combinations(expected, 2)) > 20
    for image, other in zip(images, expected):
        assert np.abs(np.asarray(image).astype(int) - other).max() <= 1
    assert not (tmp_path / "vae").samefile(tmp_path / "out/vae")

    pipeline.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    (arrays,) = again(["b", 4, None], latents=noise, **asked, output_type="np", return_dict=False)
    assert [np.rint(255 * array).astype(np.uint8).tobytes() for array in arrays] == [i.tobytes() for i in images]
    with pytest.raises(UserError, match="unknown class 'f'"):
        again("f")
    again.config["settings"]["guides"] = False
    with pytest.raises(UserError, match="it cannot be guided"):
        again("a", guidance_scale=2)
    drawn = [again(num_images=2, generator=torch.manual_seed(k), output_type="latent").images for k in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class Own(Pretrained):
    """A convolution, which may count its calls or look at its input: no trace sees the one, or follows the other."""

    calls = 0

    def __init__(self, does: str = ""):
        super().__init__()
        self.config, self.in_channels, self.num_classes, self.does = {}, 3, 5, does
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t, y):
        self.calls += self.does == "count"
        if self.does == "look" and x.mean() > 0:
            return x
        return self.conv(x) * (1 + self.calls) + t[:, None, None, None] + 0.1 * y[:, None, None, None]


def test_a_network_of_diffusers_is_in_a_folder_as_any_other(opened, tmp_path):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    model = model_of(create_denoiser("diffusers:DiTTransformer2DModel", 3, 5, **sizes))
    export(model, tmp_path / "out", "diffusers")
    assert_close(opened(tmp_path / "out").denoiser(*inputs(2)).detach(), model, inputs(2), 1e-5)


def test_one_denoiser_of_ones_own_for_a_fixed_batch(tmp_path):
    model = model_of(Own())
    program = torch.export.load(export(model, tmp_path / "out", "torch", batch=4).file).module()
    assert_close(program(*inputs(4)), model, inputs(4), 1e-6)
    with pytest.raises(Exception, match=r"(?i)shape|size|guard|expect"):
        program(*inputs(5))


def test_what_differs_is_not_kept(tmp_path):
    out = tmp_path / "out"
    export(model_of(Own()), out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match=r"differs from the model by .*, so .*out is not written"):
        export(model_of(Own("count")), out)
    with pytest.raises(UserError, match=r"Own cannot be exported: torch.export stops at"):
        export(model_of(Own("look")), out)
    model = small("U-ViT")
    model.denoiser.norm.weight.data *= 1e6  # beyond half precision
    with pytest.raises(UserError, match=r"in float16 differs from the model by .* take float32, or bfloat16"):
        export(model, out, "diffusers", "float16")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        export(model_of(Own()), out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_mistakes(mistake, checkpoint, tmp_path, monkeypatch):
    onnx = ("export", checkpoint, "out", "--format", "onnx")
    assert "--batch none: give a number from 1" in mistake(*onnx, "--batch", "none")
    assert "'dynamic' or a number from 1, not 0" in mistake(*onnx, "--batch", "0")
    assert "no convolution in bfloat16" in mistake(*onnx, "--dtype", "bfloat16")
    assert "the format onnx holds no autoencoder" in mistake(*onnx, "--autoencoder", "vae")
    assert "takes any batch" in mistake(*onnx[:-1], "diffusers", "--batch", "2")
    assert "no run or checkpoint folder" in mistake("export", "nothing", "out", "--format", "torch")
    monkeypatch.setattr("dic_repa.export.programs.find_spec", lambda name: None)
    assert "pip install 'dic-repa[export]'" in mistake(*onnx)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert "out is not an exported model, so it is not overwritten" in mistake(*onnx)


@pytest.mark.slow
def test_the_command(dic_repa, checkpoint, tmp_path):
    done = dic_repa("export", checkpoint, "out", "--format", "diffusers", "--weights", "ema")
    assert "out/model_index.json: float32" in done.stdout
    assert "of 0.0001 allowed" in done.stdout
