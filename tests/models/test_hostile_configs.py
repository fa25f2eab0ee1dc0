"""Configs and weights of strangers: refused in one line, before anything is built of them."""

from __future__ import annotations

import json
import resource
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dic_repa.encoders.digits import DigitsViT
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser, load_denoiser

OPTIONS = {"width": 8, "depths": (1, 1, 1, 1, 1)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    create_denoiser("DiC", 1, 10, **OPTIONS).save_pretrained(folder)
    (folder / "manifest.json").unlink(missing_ok=True)  # a stranger's fits, or there is none
    return folder, (folder / "config.json").read_text()


@pytest.fixture
def at_once():
    """Fails if the test takes long, or much memory, which stays with the process as its peak."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.perf_counter() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("width", 20_000, "model.safetensors does not fit this DiC; 80 of another shape"),
        ("width", 10**12, "config.json does not fit DiC"),
        ("width", 10**25, "config.json does not fit DiC"),
        ("width", "8", "DiC: width should be a valid integer, not '8'"),
        ("width", [8], "DiC: width should be a valid integer"),
        ("width", True, "DiC: width should be a valid integer, not True"),
        ("width", -8, "DiC: width should be greater than or equal to 1, not -8"),
        ("depths", [100_000, 1, 1, 1, 1], "the number of blocks is 100,004, over the limit of 300"),
        ("depths", {}, "DiC: depths should be a valid array"),
        ("num_classes", -5, "DiC: num_classes should be greater than or equal to 0, not -5"),
        ("num_classes", 10**10, "the number of classes is 10,000,000,000, over the limit of 1,000,000"),
        ("num_classes", 11, "3 of another shape: condition.0.label.weight"),
        ("in_channels", 10**9, "3 of another shape: stem.weight"),
        ("learn_sigma", "no", "DiC: learn_sigma should be a valid boolean"),
        ("time_scale", float("nan"), "DiC: time_scale should be a finite number"),
        ("block", 5, "DiC: block should be a valid string"),
        ("condition", {"kind": "vector", "dim": 10**12}, "does not fit this DiC"),
        ("condition", {"kind": ["x"]}, "is not a condition"),
        ("model", ["DiC"], "is not a model's config"),
    ],
)
def test_a_config_that_does_not_fit(key, value, said, saved, at_once):
    folder, config = saved
    (folder / "config.json").write_text(json.dumps({**json.loads(config), key: value}))
    with pytest.raises(UserError, match=said):
        load_denoiser(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"\xff\xfe", b"[" * 10**5, b'{"width": ' + b"9" * 5000 + b"}"])
def test_a_config_that_is_none(content, saved):
    folder, _ = saved
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json is (damaged|not a model's config)"):
        load_denoiser(folder)


def test_weights_larger_than_memory_are_not_read(saved, tmp_path):
    folder, config = saved
    (folder / "config.json").write_text(config)
    assert sum(p.numel() for p in load_denoiser(folder).parameters())  # as it was
    head = json.dumps({"stem.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "config.json").write_text(config)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + 2**42)  # sparse: it takes no space
    with pytest.raises(UserError, match=r"the size of .* is 4,398,046,511,..., over the limit"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("DiC", {"width": 20_000, "depths": (1,) * 5}, "the memory for the weights of model 'DiC', in bytes, is 1,6"),
        ("SiT", {"width": 64, "depth": 10**6, "num_heads": 4}, "SiT: depth: it is 1,000,000, over the limit of 300"),
        ("SiT", {"width": 64, "depth": 4, "num_heads": 0}, "num_heads should be greater than or equal to 1"),
        ("U-ViT", {"width": 64, "depth": 5, "num_heads": 4, "size": 10**9}, "does not take these options"),
        ("DiC-S", {"time_scale": "1"}, "time_scale takes a number"),
    ],
)
def test_a_recipe_asks_for_too_much(name, options, said, at_once):
    with pytest.raises(UserError, match=said):
        create_denoiser(name, 4, 10, **options)


def test_sketching_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    first = create_denoiser("DiC", 1, 10, **OPTIONS).stem.weight
    torch.manual_seed(0)
    from dic_repa.models.dic import DiC

    assert torch.equal(DiC(in_channels=1, num_classes=10, **OPTIONS).stem.weight, first)


@pytest.mark.parametrize(
    "config", ['{"depth": 1000000000}', '{"embed_dim": 64}', '{"x": 1}', "[]", "{", '{"depth": []}']
)
def test_an_encoder_of_a_stranger(config, tmp_path, at_once):
    import dic_repa.encoders.digits as module

    own = load_file(module.__file__.replace("digits.py", "weights/digits_vit.safetensors"))
    save_file(own, tmp_path / "w.safetensors", metadata={"config": config})
    with pytest.raises(UserError, match=r"w.safetensors"):
        DigitsViT(tmp_path / "w.safetensors")
