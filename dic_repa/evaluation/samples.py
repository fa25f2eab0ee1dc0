"""Samples of a run, a checkpoint, a folder or an `.npz` against a reference, and a record of how they were measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import describe_extractor
from dic_repa.evaluation.measuring import Measure, Measured
from dic_repa.evaluation.reference import UNKNOWN_COUNT
from dic_repa.evaluation.runs import describe_sampling
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK
from dic_repa.models.pretrained import CONFIG
from dic_repa.recipe import Recipe, SampleSection
from dic_repa.recipe.schema import SamplingRecipe
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.environment import describe_environment
from dic_repa.runs.folder import RunFolder
from dic_repa.sampling import SAMPLES_FILE
from dic_repa.sampling.folder import SampleFolder, sample_into, sample_spec
from dic_repa.sampling.labels import draw_labels
from dic_repa.sampling.load import load


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is something to sample from: a run, or a checkpoint of a run or for inference."""
    return any((path / name).exists() for name in ("recipe.yaml", "checkpoints", f"ema/{CONFIG}", CONFIG))


def record_file(samples: Path) -> Path:
    """Where the record of a folder or file of samples is kept by default."""
    return samples / "metrics.json" if samples.is_dir() else samples.with_suffix(".metrics.json")


def sample_checkpoint(
    path: Path,
    recipe: Recipe | SamplingRecipe | None,
    override: Callable[[SampleSection], SampleSection],
    processes: Accelerator,
    weights: str | None = None,
    again: bool = False,
) -> Path:
    """The folder of samples of a run or checkpoint, with those that are missing drawn now.

    Args:
        recipe: whose `sample` section to use; by default the run's own.
        override: changes that section as the command line says.
        weights: which to sample from; by default as the recipe says.
        again: sample anew.
    """
    weights = weights or (recipe.sample.weights if recipe else None)
    loaded = load(path, processes.device, recipe if isinstance(recipe, Recipe) else None, weights)
    settings = override((recipe or loaded.recipe).sample)
    labels = draw_labels(loaded.recipe, loaded.condition, settings)
    sampler = loaded.sampler(settings)
    place, name = Path("samples"), path.resolve().name
    if (path / "checkpoints").is_dir():
        newest = RunFolder.open(path).newest_checkpoint("ema")
        if newest is None:
            raise UserError(f"{path} has no checkpoint yet")
        place, name = path / "evaluation", f"step_{checkpoint_step(newest):08d}"
    place /= f"{name}-{describe_sampling(settings).replace(' ', '-')}"
    folder = SampleFolder(place, sample_spec(loaded, settings, labels), "pass --again to sample anew")
    sample_into(folder, sampler, labels, processes, overwrite=again)
    return place


def labels_of(samples: Path, count: int) -> Tensor | None:
    """The classes that the `count` images of a folder of samples should show; None if nothing tells them."""
    spec = samples / SAMPLES_FILE
    labels = json.loads(spec.read_text()).get("labels", ()) if spec.is_file() else ()
    return torch.tensor(labels) if len(labels) == count else None


def record(measured: Measured, measure: Measure, images, reference, options: dict, device: str, processes: int) -> dict:
    """What `metrics.json` holds: the scores, and everything that is needed to repeat them."""
    samples = {"path": images.source, "count": measured.count, "size": list(measured.size)}
    samples["fingerprint"] = images.fingerprint
    spec = Path(images.source) / SAMPLES_FILE
    if spec.is_file():
        samples["sampling"] = {key: v for key, v in json.loads(spec.read_text()).items() if key != "labels"}
    extractors = {
        name: {**describe_extractor(extractor), **getattr(extractor, "made_of", {}), "notes": extractor.notes}
        for name, extractor in measure.extractors.items()
    }
    found, described = measure.reference, None
    if found is not None:
        described = {
            "path": str(reference),
            "count": found.count if found.count < UNKNOWN_COUNT else None,
            "size": found.size,
            "fingerprint": found.fingerprint,
            "features": {layer: len(part) for layer, part in found.features.items()},
        }
    return {
        "metrics": measured.values,
        "intervals": measured.intervals,
        "warnings": measured.warnings,
        "samples": samples,
        "reference": described,
        "extractors": extractors,
        "options": options,
        "precision": {"networks": "float32", "tf32": False, "statistics": "float64"},
        **describe_environment(device, processes),
    }


def save_record(path: Path, content: dict) -> None:
    """Write a record as JSON; a UserError where there is something else at `path`."""
    write_whole(path, json.dumps({"made_by": MARK, **content}, indent=2, default=_plain) + "\n")


def _plain(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
