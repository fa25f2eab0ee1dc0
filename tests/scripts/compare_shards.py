"""How fast tar shards are read, against the same images and moments in Arrow's form, in one run.

    python tests/scripts/compare_shards.py --images 400 --rounds 9

Both forms are prepared of the same coarse noise of 256 px, with moments of an autoencoder's shape (8, 32, 32), and are
in the page cache. Each round reads both through the loader of the training loop, in turn, and begins with another one.
Printed is webdataset's ratio to prepared, of samples a second and, since other programs may take the processor, of
samples for each second of its own processor time: the median of the rounds, with the lowest and highest quarter's ends.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import torch
from pictures import write_tree
from small_runs import small_recipe

from dic_repa.bench.data import _loader_speed
from dic_repa.data import Prepared, WebDataset
from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.data.prepare import Preparation
from dic_repa.data.prepare_tars import TarPreparation
from dic_repa.data.sources import open_source
from dic_repa.training.inputs import Batches

SIZE = 256


class Noise:
    """In place of an autoencoder: moments of its shape."""

    spec = AutoencoderSpec("noise", 4, 8, (0.0,), (1.0,))
    device = "cpu"

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(images), 8, SIZE // 8, SIZE // 8)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 3, SIZE, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shards", type=int, default=4, help="mix among so many shards (0: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        measure(Path(folder), arguments.images, arguments.rounds, arguments.shards)


def measure(folder: Path, count: int, rounds: int, window: int) -> None:
    write_tree(folder / "tree", {"a": count // 2, "b": count - count // 2}, (SIZE, SIZE))
    for kind in (Preparation, TarPreparation):
        preparation = kind(open_source(folder / "tree"), folder / kind.layout, Noise(), size=SIZE, shard_size=200)
        preparation.begin()
        preparation.write_shards()
        preparation.finish()
    forms = {
        "arrow": Prepared(folder / "arrow"),
        "webdataset": WebDataset(folder / "webdataset"),
        "window": WebDataset(folder / "webdataset", shuffle_shards=window),
    }
    print("| what is read | workers | mixed among | samples a second | for a second of the processor |")
    print("|---|---|---|---|---|")
    for images in (True, False):
        for workers in (0, 1, 2):
            taken = {name: [] for name in forms}
            for k in range(rounds):
                names = list(forms)
                for name in names[k % 3 :] + names[: k % 3]:
                    forms[name].with_images = images
                    taken[name].append(read(forms[name], 100 * k, count if images else 5 * count, workers))
            for name, mixed in (("webdataset", "all shards"), ("window", f"{window} shards")):
                pairs = list(zip(taken[name], taken["arrow"]))
                shown = [quarters(sorted(a[which] / b[which] for a, b in pairs)) for which in (0, 1)]
                what = "images and moments" if images else "moments"
                print(f"| {what} | {workers} | {mixed} | {' | '.join(shown)} |", flush=True)


def read(data, start: int, count: int, workers: int) -> tuple[float, float]:
    """Samples a second, and the inverse of the processor's time."""
    recipe = small_recipe("train.batch_size=32", f"data.workers={workers}")
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    before = processor_time()
    batches = Batches(data, recipe, accelerator, start)
    speed = _loader_speed(batches, count, workers)
    batches.close()
    return speed, 1 / (processor_time() - before)


def processor_time() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def quarters(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
