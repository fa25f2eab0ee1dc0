"""Samples of a run, a checkpoint, a folder or an `.npz` against a reference, and a record of how they were measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import describe_extractor
from dic_repa.evaluation.measuring import Measure, Measured
from dic_repa.evaluation.reference import UNKNOWN_COUNT
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK
from dic_repa.models.pretrained import CONFIG
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.environment import describe_environment
from dic_repa.runs.folder import RunFolder
from dic_repa.sampling import SAMPLES_FILE


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is something to sample from: a run, or a checkpoint of a run or for inference."""
    return any((path / name).exists() for name in ("recipe.yaml", "checkpoints", f"ema/{CONFIG}", CONFIG))


def samples_folder(path: Path, described: str) -> Path:
    """Where the samples of a run or checkpoint are kept, whose settings `described` tells."""
    if (path / "checkpoints").is_dir():
        run = RunFolder.open(path)
        newest = run.newest_checkpoint("ema")
        if newest is None:
            raise UserError(f"{path} has no checkpoint yet")
        return run.path / "evaluation" / f"step_{checkpoint_step(newest):08d}-{described.replace(' ', '-')}"
    return Path("samples") / f"{path.resolve().name}-{described.replace(' ', '-')}"


def record(measured: Measured, measure: Measure, images, reference, options: dict, device: str, processes: int) -> dict:
    """What `metrics.json` holds: the scores, and everything that is needed to repeat them."""
    samples = {"path": images.source, "count": measured.count, "size": list(measured.size)}
    samples["fingerprint"] = images.fingerprint
    spec = Path(images.source) / SAMPLES_FILE
    if spec.is_file():
        samples["sampling"] = {key: v for key, v in json.loads(spec.read_text()).items() if key != "labels"}
    found = measure.reference
    return {
        "metrics": measured.values,
        "intervals": measured.intervals,
        "warnings": measured.warnings,
        "samples": samples,
        "reference": None if found is None else {"path": str(reference), **_describe_reference(found)},
        "extractors": {
            name: {
                **describe_extractor(extractor),
                **getattr(extractor, "made_of", {}),
                "notes": extractor.notes,
            }
            for name, extractor in measure.extractors.items()
        },
        "options": options,
        "precision": {"networks": "float32", "tf32": False, "statistics": "float64"},
        **describe_environment(device, processes),
    }


def _describe_reference(found) -> dict:
    return {
        "count": found.count if found.count < UNKNOWN_COUNT else None,
        "size": found.size,
        "fingerprint": found.fingerprint,
        "features": {layer: len(part) for layer, part in found.features.items()},
    }


def save_record(path: Path, content: dict) -> None:
    """Write a record as JSON; a UserError where there is something else at `path`."""
    write_whole(path, json.dumps({"made_by": MARK, **content}, indent=2, default=_plain) + "\n")


def _plain(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)
