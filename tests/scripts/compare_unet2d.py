"""Train diffusers' UNet2DModel on the digits with and without `Aligner`, and compare the Fréchet distances of samples.

    python tests/scripts/compare_unet2d.py

The training is examples/diffusers_unet.py's, without labels; runs that are there already are not trained again. Some
minutes each, on one thread; docs/results.md has the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import diffusers_unet
import torch
from diffusers import DDIMPipeline

from dic_repa.evaluation import measure


def train_and_score(folder: Path, align: bool, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """FD-digits of a new run's samples against the held-out digits, its last denoising losses, and its seconds."""
    options = [f"--{key}={getattr(arguments, key.replace('-', '_'))}" for key in ("steps", "width", "batch-size")]
    options += [f"--seed={seed}", f"--out={folder}"]
    begin = time.monotonic()
    losses = diffusers_unet.main([*options, "--align" if align else "--no-align"], standalone_mode=False)
    seconds = time.monotonic() - begin
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)  # the same noise for all
    count = arguments.samples // 100
    arrays = [
        pipeline(100, generator, num_inference_steps=arguments.sampling_steps, output_type="np").images
        for _ in range(count)
    ]
    images = [torch.from_numpy(array).permute(0, 3, 1, 2) for array in arrays]
    scores = measure(images, "digits", ["fd-digits"])
    return {**scores, "denoising": statistics.mean(losses[-100:]), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("runs/unet2d"))
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"no alignment": [], "aligned": []}
    for seed in arguments.seeds:
        for name, align in (("no alignment", False), ("aligned", True)):
            folder = arguments.out / f"{name.replace(' ', '-')}-{seed}"
            if not (folder / "scores.json").exists():
                scores = train_and_score(folder, align, seed, arguments)
                (folder / "scores.json").write_text(json.dumps(scores))
            found[name].append(json.loads((folder / "scores.json").read_text()))
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    for name, scores in found.items():
        for key in ("fd-digits", "denoising"):
            values = [score[key] for score in scores]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            each = ", ".join(f"{value:.4g}" for value in values)
            print(f"{name}: {key} {statistics.mean(values):.4g} ± {spread:.2g} ({each})")


if __name__ == "__main__":
    main()
