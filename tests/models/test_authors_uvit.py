"""U-ViT's public files: their layout, the schedule that its largest is trained on, and the recipe of that row."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser, load_authors_checkpoint, load_denoiser
from dic_repa.models.authors_uvit import infer_uvit
from dic_repa.models.uvit import UViT
from dic_repa.objectives import DDPM
from dic_repa.recipe import load_recipe


@pytest.fixture(scope="module")
def reference():
    """A small U-ViT of random weights in the layout of its code, and what that code gave."""
    return load_file(DATA / "authors_uvit_tiny.safetensors")


def weights(reference) -> dict:
    return {key.removeprefix("model."): value for key, value in reference.items() if key.startswith("model.")}


@torch.no_grad()
def test_a_file_of_the_authors_gives_what_their_code_gives(reference, tmp_path):
    torch.save(weights(reference), tmp_path / "nnet_ema.pth")
    model = load_authors_checkpoint(tmp_path / "nnet_ema.pth", num_heads=2, time_scale=1.0)
    out = model(reference["x"], reference["t"], reference["y"])  # time and label tokens, skips, patches, the last conv
    torch.testing.assert_close(out, reference["out"], rtol=1e-5, atol=1e-5)
    assert (model.num_classes, model.size, model.config["final_conv"]) == (5, 8, True)  # its sixth class is the null
    # Trained on the VP path, as all but the largest, it embeds 999 t.
    model = load_authors_checkpoint(weights(reference), num_heads=2)
    torch.testing.assert_close(model(reference["x"], reference["t"] / 999, reference["y"]), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "time_scale"), [("U-ViT-H/2", 1), ("U-ViT-L/2", 999), ("U-ViT-H/4", 1)])
def test_a_published_size_is_its_preset(name, time_scale):
    with torch.device("meta"):
        config = create_denoiser(name).config
        patch, width, channels = config["patch_size"], config["width"], config["in_channels"]
        state = {f"in_blocks.{i}.norm1.bias": torch.empty(width) for i in range(config["depth"] // 2)}
        state["patch_embed.proj.weight"] = torch.empty(width, channels, patch, patch)
        state["label_emb.weight"] = torch.empty(1001, width)
        state["pos_embed"] = torch.empty(1, 2 + (config["size"] // patch) ** 2, width)
        if config["final_conv"]:
            state["final_layer.weight"] = torch.empty(channels, channels, 3, 3)
    assert {**infer_uvit(state), "learn_sigma": False} == {**config, "time_scale": time_scale}


def test_convert_makes_a_folder_of_it(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(weights(reference), "theirs.safetensors")
    with pytest.raises(SystemExit) as exit:
        main(["convert", "theirs.safetensors", "ours"])
    assert exit.value.code == 0
    assert isinstance(load_denoiser("ours"), UViT)
    unconditional = {key: value for key, value in weights(reference).items() if key != "label_emb.weight"}
    with pytest.raises(UserError, match=r"not a checkpoint of a U-ViT with classes: .* label_emb"):
        load_authors_checkpoint(unconditional)


class Remembers(torch.nn.Module):
    num_classes = 5

    def forward(self, x, t, y):
        self.t = t
        return torch.zeros_like(x)


def test_the_largest_is_trained_on_stable_diffusions_betas_from_step_one():
    recipe = load_recipe("u-vit-h-2")
    objective = DDPM(**recipe.objective.options)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(objective.schedule.alpha_bar, torch.cumprod(1 - betas, 0))
    x, steps = torch.ones(3, 1, 1, 1), torch.tensor([0.0, 416.0, 999.0])
    noisy = objective.corrupt(x, steps, torch.zeros_like(x))
    assert noisy.t.tolist() == [1, 417, 1000]
    assert noisy.unit_time.tolist() == pytest.approx([0.001, 0.417, 1])
    torch.testing.assert_close(noisy.x_t.flatten().double(), torch.cumprod(1 - betas, 0)[[0, 416, 999]].sqrt())
    y, seen = torch.zeros(3, dtype=torch.int64), Remembers()
    objective.noise_model(seen)(x, torch.tensor([0.001, 0.417, 1.0]), y)
    assert seen.t.tolist() == [1, 417, 1000]
    objective.velocity_model(seen)(x, torch.tensor([1e-6, 0.5, 1.0]), y)  # any ODE solver's times
    assert seen.t[0] == 1
    assert 1 < seen.t[1] < 1000
    assert seen.t[2] == pytest.approx(1000, abs=2)  # the path ends with as much noise as the schedule
    with pytest.raises(UserError, match="scaled-linear"):
        DDPM(betas="scaled_linear")


def test_the_rows_optimizer_is_its_codes():
    recipe = load_recipe("u-vit-h-2")
    train, optimizer = recipe.train, recipe.optimizer
    assert (train.steps, train.batch_size, recipe.schedule.warmup_steps) == (500_000, 1024, 5000)
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (2e-4, (0.99, 0.99), 0.03)
    assert train.gradient_clip is None
