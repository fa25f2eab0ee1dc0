"""Runs of a second, in this process, for tests of the training loop."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from dic_repa.data import datasets
from dic_repa.data.digits import Digits
from dic_repa.recipe import Recipe, load_recipe
from dic_repa.runs import RunFolder
from dic_repa.training import train

SMALL = [
    "model.width=8",
    "model.depths=[1,1,1,1,1]",
    "alignments=[]",
    "train.steps=8",
    "train.batch_size=4",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "train.sample_every=0",
    "evaluate=null",
]
ALIGNED = [*(key for key in SMALL if key != "alignments=[]"), "alignments.0.head_options.hidden=16"]


def small_recipe(*overrides: str, base: list[str] = SMALL) -> Recipe:
    return load_recipe("digits-urepa", [*base, *overrides])


def small_run(path: Path, *overrides: str, base: list[str] = SMALL, **options) -> RunFolder:
    return train(small_recipe(*overrides, base=base), path, **options)


def metrics(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights, their average and the optimizer's state."""
    found = load_parts(checkpoint, "model")
    found |= {f"ema {name}": tensor for name, tensor in load_file(checkpoint / "ema/model.safetensors").items()}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    found |= {f"optimizer {i} {name}": tensor for i, values in state.items() for name, tensor in values.items()}
    if any(checkpoint.glob("optimizer-*")):
        parts = load_parts(checkpoint, "optimizer").items()
        found |= {f"optimizer {name.replace('.', ' ')}": tensor for name, tensor in parts}
    return dict(sorted(found.items()))


def load_parts(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of NAME.safetensors, or of the files of a sharded run, each of which has the next rows."""
    if (file := checkpoint / f"{name}.safetensors").is_file():
        return load_file(file)
    parts = [load_file(file) for file in sorted(checkpoint.glob(f"{name}-*-of-*.safetensors"))]
    found = {key: [part[key] for part in parts if key in part] for key in {key for part in parts for key in part}}
    return {key: torch.cat(rows) if rows[0].dim() else rows[0] for key, rows in found.items()}


@contextlib.contextmanager
def full_disk(limit: int = 2000) -> Iterator[None]:
    """A write beyond `limit` bytes of a file fails as one to a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_same(a: dict, b: dict, rtol: float = 0, atol: float = 0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )


class PoisonedDigits(Digits):
    """Digits of which some are not finite: those whose index is in `poisoned`."""

    poisoned: frozenset[int] = frozenset()

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"x": sample["x"] * float("inf")} if index in self.poisoned else sample


if "poisoned-digits" not in datasets:
    datasets.register("poisoned-digits")(PoisonedDigits)
