"""What the Python of a page needs to run small; tests/test_snippets.py runs it. A page needs nothing here if it does so
as it stands.

A function has the name of its page (`examples` for examples/README.md). It is called in the empty folder in which the
page's blocks will run, with the dictionary of their names, into which it may put names that the page leaves to its
reader. It yields what of the text is replaced by what, {"steps=250": "steps=2"}, and behind that says what must hold
afterwards.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from pages import blocks
from small_runs import ALIGNED, SMALL, small_run
from small_samplers import write_tiny_checkpoint
from torch.nn.functional import mse_loss

from dic_repa.cli import main
from dic_repa.export import export as write_export
from dic_repa.models import create_denoiser
from dic_repa.sampling.load import load

Names, Setup = dict[str, Any], Iterator[dict[str, str]]


def readme(names: Names) -> Setup:
    small = [*ALIGNED, "train.steps=2"]
    small_run("runs/digits-urepa", "train.steps=2", base=SMALL)
    unet, target = UNet2DModel(16, 3, 3, block_out_channels=(32, 32), down_block_types=["DownBlock2D"] * 2,
                               up_block_types=["UpBlock2D"] * 2), torch.randn(2, 3, 16, 16)  # fmt: skip
    names |= {"unet": unet, "target": target, "noisy": target, "x": target, "t": torch.rand(2), "mse_loss": mse_loss}
    replaced = {"dinov2-vit-b": "efficientnet-lite0", "image_size=256": "image_size=16", "steps=20,": "steps=2,"}
    yield replaced | {'["train.steps=200"]': repr(small), "aligner(images, t)": "aligner(target.sigmoid(), t)"}
    assert [image.size for image in names["images"]] == [(16, 16)] * 2
    assert names["loss"].isfinite()
    assert names["run"].newest_checkpoint().name == "step_00000002"


def guide(names: Names) -> Setup:
    yield {'["train.steps=200"]': repr([*ALIGNED, "train.steps=2"]), "steps=20,": "steps=2,"}
    assert [image.size for image in names["images"]] == [(16, 16)] * 2


def sampling(names: Names) -> Setup:
    small_run("runs/short", "train.steps=2", base=SMALL)
    yield {"step_00000200": "step_00000002", "steps=20,": "steps=2,"}
    assert names["x0"].shape == (2, 1, 16, 16)
    assert names["x0"].isfinite().all()
    assert names["result"].bits_per_dim.isfinite().all()


def export(names: Names) -> Setup:
    """A checkpoint of random weights, written in each form as the page says; its images are those of `model.sample`."""
    write_tiny_checkpoint(Path("runs/digits-urepa"))
    model = load("runs/digits-urepa")
    write_export(model, "digits-pipeline", "diffusers")
    other = create_denoiser("SiT", 1, 10, width=8, depth=1, num_heads=1)  # quicker to trace
    torch.nn.init.normal_(other.output.linear.weight)
    write_export(replace(model, denoiser=other), "digits-torch", "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(Path("modules").resolve()))
        patch.setattr("sys.path", list(sys.path))
        yield {}
    keys = {"classes": [3, 7], "solver": "heun", "steps": 20, "guidance": {"scale": 1.5, "interval": (0.0, 0.7)}}
    expected = np.stack([np.asarray(image, dtype=int) for image in model.sample(**keys)])
    assert np.abs(names["images"][:, 0] - expected).max() <= 1
    assert len(np.unique(expected)) > 50
    x, t, y = names["x"], names["t"], names["y"]
    torch.testing.assert_close(names["velocity_at_half"], other(x, t, y))
    assert [picture.size for picture in names["pictures"]] == [(16, 16)] * 2


def examples(names: Names) -> Setup:
    """The names of somebody's training script, around a small U-Net of diffusers."""
    from diffusers import UNet2DModel
    from torch.nn import functional as F

    unet = UNet2DModel(
        16, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    x, images, noise = torch.rand(3, 2, 3, 16, 16)
    names |= {"torch": torch, "F": F, "unet": unet, "x": x, "noisy": x, "images": images, "noise": noise}
    names["t"] = torch.tensor([0, 999])
    yield {"dinov2-vit-b": "digits-vit", "image_size=256": "image_size=16"}
    names["loss"].backward()
    assert all(parameter.grad is not None for parameter in names["aligner"].parameters())


def hub(names: Names) -> Setup:
    small_run("runs/short", "train.steps=2", base=SMALL)
    yield {}
    assert Path("hub/digits/README.md").is_file()
    assert names["denoiser"].in_channels == 1


def papers(names: Names) -> Setup:
    """A file in the layout of SiT's, one block deep, with random weights."""
    from dic_repa.models.sit import position_embedding

    model = create_denoiser("SiT-S/2", in_channels=4, num_classes=10, depth=1, learn_sigma=True)
    theirs = {
        "patches.": "x_embedder.",
        "condition.time1.": "t_embedder.mlp.0.",
        "condition.time2.": "t_embedder.mlp.2.",
        "condition.label.": "y_embedder.embedding_table.",
        "blocks.0.modulation.": "blocks.0.adaLN_modulation.1.",
        "output.modulation.": "final_layer.adaLN_modulation.1.",
        "output.": "final_layer.",
    }
    state = {"pos_embed": position_embedding((16, 16), 384)[None]}
    for name, tensor in model.state_dict().items():
        ours = next((prefix for prefix in theirs if name.startswith(prefix)), "")
        state[theirs.get(ours, "") + name.removeprefix(ours)] = tensor
    torch.save(state, "SiT-XL-2-256x256.pt")
    yield {}
    assert len(names["denoiser"].blocks) == 1


def aligner(names: Names) -> Setup:
    """As it stands; the feature cache goes into the empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIC_REPA_CACHE", "cache")
        yield {}
    assert names["loss"].isfinite()
    assert set(names["aligner"].logs) == {"alignment.0.token", "alignment.0.manifold"}


def finetuning(names: Names) -> Setup:
    """The page's commands run first, at a small size, on a run and on a file in the layout of the DiC authors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("HF_HUB_OFFLINE", "1")
        run = small_run("runs/digits-urepa", "train.steps=2", base=SMALL)
        small = ["train.steps=1", "train.sample_every=0", "evaluate=null", "sample.steps=1", "train.batch_size=4"]
        small += ["model.width=8", "model.depths=[1,1,1,1,1]", *(f"sample.{key}" for key in ("num=4", "batch_size=4"))]
        for line in "".join(blocks("docs/finetuning.md", "bash")).splitlines():
            _, verb, recipe, *options = shlex.split(line, comments=True)
            if recipe == "my_photos.yaml":  # needs a file of somebody else's
                continue
            sets = [f"--set={key}" for key in small] if verb == "train" else []
            with pytest.raises(SystemExit, match="0"):
                main([verb, recipe, *options, *sets])
        assert load("tuned").denoiser.config == load(run.path).denoiser.config
        yield {"steps=20": "steps=2"}
    assert [image.size for image in names["images"]] == [(16, 16)] * 2
    assert not any("lora" in name for name, _ in names["model"].denoiser.named_parameters())


def python(names: Names) -> Setup:
    small_run("runs/digits-urepa", "train.steps=2", "sample.steps=2", base=SMALL)
    train = {
        'dic_repa.train("digits-urepa")': f"dic_repa.train(dic_repa.load_recipe('digits-urepa', {SMALL}), 'again')"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(Path("cache").resolve()))
        yield {"steps=50": "steps=2", "steps=20": "steps=2", "num=100": "num=20", **train}
    assert len(names["between"]) == 8
    assert len(names["painted"]) == 2
    assert names["noise"].shape == names["x"].shape == (2, 1, 16, 16)
