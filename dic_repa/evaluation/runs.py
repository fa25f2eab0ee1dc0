"""Samples of runs and checkpoints, drawn and scored, and the records that are kept of them.

`evaluate_run` judges a run as its recipe says. `sample_checkpoint` draws the samples that `dic-repa evaluate` measures
against a reference, and `record` says how they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.data.registry import named_data
from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import describe_extractors
from dic_repa.evaluation.image_sets import ImageSet
from dic_repa.evaluation.judge import by_encoder, judge_of, own_encoder, real_images
from dic_repa.evaluation.measuring import Measure, Measured
from dic_repa.evaluation.reference import UNKNOWN_COUNT
from dic_repa.files.atomic import write_whole
from dic_repa.files.lock import locked
from dic_repa.files.outputs import MARK, check_file
from dic_repa.files.pictures import draw_grid, save_picture, shown_in_grid
from dic_repa.files.reading import read_json
from dic_repa.models.pretrained import CONFIG
from dic_repa.recipe import GuidanceSection, Recipe, SampleSection, load_training_recipe
from dic_repa.recipe.build import import_plugins
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.environment import describe_environment
from dic_repa.runs.folder import RunFolder
from dic_repa.runs.listing import current_names
from dic_repa.runtime.progress import warn
from dic_repa.sampling.folder import SampleFolder, completed, sample_into, sample_spec
from dic_repa.sampling.labels import draw_labels
from dic_repa.sampling.load import Checkpoint, load
from dic_repa.sampling.weights import weak_weights

COLUMNS = 12  # images of each class in the picture


@dataclass
class Judgement:
    """What a run's samples scored, and where the record and the picture of them are."""

    run: Path
    step: int
    recipe: Recipe
    sample: SampleSection
    scores: dict = field(default_factory=dict)
    evaluations: int = 0  # of the network, per image

    @property
    def record(self) -> Path:
        name = f"step_{self.step:08d}-{describe_sampling(self.sample).replace(' ', '-')}.json"
        return self.run / "evaluation" / name

    @property
    def picture(self) -> Path:
        return self.record.with_suffix(".png")

    def identity(self) -> dict:
        """What the records of the same judgement have in common."""
        names = self.recipe.evaluate.names if self.recipe.evaluate else ()
        metric, sample = "+".join(names), self.sample.model_dump(mode="json")
        bound = {"bound": bound} if self.recipe.evaluate and (bound := self.recipe.evaluate.bound) else {}
        weak = weak_weights(self.sample, RunFolder(self.run).checkpoint_path(self.step) / "ema")
        return {"step": self.step, "metric": metric, "sample": sample, **bound, **weak}

    def read(self) -> bool:
        """Take the scores from a whole record of the same judgement; False if there is none."""
        if not self.record.exists():
            return False
        try:
            record = completed(read_json(self.record, "it is made again", dict))
            wanted = self.identity()
            same = {key: record.get(key) for key in wanted} == wanted
            whole = isinstance(record.get("scores"), dict) and isinstance(record.get("evaluations"), int | None)
            if same and not whole:
                raise UserError(f"{self.record} is damaged (it has no scores); it is made again")
        except UserError as error:
            warn(str(error))
            return False
        if same:
            self.scores, self.evaluations = current_names(record["scores"]), record.get("evaluations")
        return same

    def save(self, images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
        """Write the picture of the samples and the record of their scores."""
        save_picture(draw_grid(images, labels, class_names, COLUMNS), self.picture)
        record = {"made_by": MARK, **self.identity(), "evaluations": self.evaluations, "scores": self.scores}
        write_whole(self.record, json.dumps(record, indent=2) + "\n")


def evaluate_run(
    path: str | Path,
    sample: SampleSection | None = None,
    again: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Judgement:
    """Sample as `sample` says (by default as the run's recipe says) and score by the recipe's metrics.

    The result is kept in RUN/evaluation and read from there next time, unless `again`. `progress` is called with the
    number of images of each batch.
    """
    run = RunFolder.open(path)
    newest = run.newest_checkpoint("ema")
    if newest is None:
        raise UserError(f"{path} has no checkpoint yet")
    recipe = run.recipe()
    if recipe.evaluate is None:
        raise no_judge(path)
    sample = sample or recipe.sample
    judged = Judgement(run.path, checkpoint_step(newest), recipe, sample)
    if not again and judged.read():
        return judged
    for file in (judged.record, judged.picture):
        check_file(file)
    with locked(judged.record.parent):
        _judge(judged, newest, progress)
    return judged


def _judge(judged: Judgement, newest: Path, progress: Callable[[int], object]) -> None:
    """Sample from the checkpoint `newest`, score, and save."""
    recipe, sample = judged.recipe, judged.sample
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load(newest, device, weights=sample.weights)
    labels = draw_labels(recipe, checkpoint.condition, sample)
    sampler = checkpoint.sampler(sample)
    rows = shown_in_grid(labels, COLUMNS)
    shown: dict[int, Tensor] = {}

    def batches() -> Iterator[Tensor]:
        start = 0
        for batch in sampler(labels):
            shown.update({i: batch[i - start].clone() for i in rows if start <= i < start + len(batch)})
            start += len(batch)
            progress(len(batch))
            yield batch

    judged.scores = judge_of(recipe, device)(batches(), labels)
    judged.evaluations = sampler.evaluations
    judged.save(torch.stack([shown[i] for i in rows]), labels[rows], checkpoint.condition.names)


def no_judge(path: str | Path, hint: str = "") -> UserError:
    """The error for a run whose recipe does not say how to judge its samples."""
    hint = hint or f"add one to {Path(path) / 'recipe.yaml'}, such as `evaluate: {{metric: fid, reference: FOLDER}}`"
    return UserError(f"the recipe of {path} has no `evaluate` section to say how to judge it; {hint}")


def encoder_of_runs(paths: Sequence[Path], names: Sequence[str]) -> dict[str, dict]:
    """`own_encoder` of the runs and checkpoints among `paths`, if a metric of `names` takes it.

    Raises:
        UserError: they were aligned to different ones.
    """
    found: dict[str, dict] = {}
    for place, recipe in _recipes_of(paths) if by_encoder(names) else ():
        own = own_encoder(recipe)
        if own and found and own != found:
            raise UserError(f"{place} was aligned to another encoder than the one before; name one by --encoder")
        found = found or own
    return found


def real_images_of_runs(paths: Sequence[Path], source: str | None) -> ImageSet | str | None:
    """`real_images` of the first run or checkpoint among `paths` that was trained on the data set that is named."""
    if source and named_data(source):
        for _, recipe in _recipes_of(paths):
            if isinstance(found := real_images(recipe, source), ImageSet):
                return found
    return source


def _recipes_of(paths: Sequence[Path]) -> Iterator[tuple[Path, Recipe]]:
    """The recipes of the runs and checkpoints among `paths`, and the folders that these are in."""
    for file in (path / name for path in paths for name in ("recipe.yaml", "ema/recipe.yaml")):
        if file.is_file():
            recipe = load_training_recipe(file)
            import_plugins(recipe)
            yield file.parent, recipe


def describe_sampling(sample: SampleSection) -> str:
    """'500 heun 20' and then what is not the default, as in 'cfg 1.8 0.0 0.7'; short enough for a file's name."""
    words: list[object] = [sample.num, sample.solver] + ([sample.steps] if sample.steps else [])
    words += [f"{sample.classes} classes"] if sample.classes != "balanced" else []
    words += ["truncated"] if sample.pixels == "truncate" else []
    words += ["weights", sample.weights] if sample.weights != "ema" else []
    words += ["seed", sample.seed] if sample.seed else []
    for key in SampleSection.solver_keys():
        if key not in ("steps", "grid", "options") and getattr(sample, key) is not None:
            words += [key, getattr(sample, key)]
    if sample.grid:
        words += [sample.grid.name, *sample.grid.options.values(), *(sample.grid.times or ())]
    if guidance := sample.guidance:
        alone = guidance.kind == "cfg" and guidance.scale == 1 and guidance.internal != 1
        words += [] if alone else [guidance.kind, guidance.scale, *guidance.interval]
        for key in ("channels", "schedule", "rescale", "weak", "internal", "internal_interval"):
            value = getattr(guidance, key)
            if value != GuidanceSection.model_fields[key].default:
                words += [key, *(value if isinstance(value, tuple) else [str(value).replace("/", "-")])]
    return " ".join(map(str, words))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is something to sample from: a run, or a checkpoint of a run or for inference."""
    return any((path / name).exists() for name in ("recipe.yaml", "checkpoints", f"ema/{CONFIG}", CONFIG))


def sample_checkpoint(
    path: Path, loaded: Checkpoint, sample: SampleSection, processes: Accelerator, again: bool = False
) -> Path:
    """The folder of samples of what was `loaded` from `path`; missing samples are drawn now, or `again` all of them."""
    labels = draw_labels(loaded.recipe, loaded.condition, sample)
    sampler = loaded.sampler(sample)
    newest = RunFolder(path).newest_checkpoint("ema")  # None if `path` is one checkpoint
    run = path if newest else path.parent.parent
    of_a_run = newest or (path.parent.name == "checkpoints" and (run / "recipe.yaml").is_file())
    place = (run / "evaluation" if of_a_run else Path("samples")) / (newest or path.resolve()).name
    place = place.with_name(f"{place.name}-{describe_sampling(sample).replace(' ', '-')}")
    folder = SampleFolder(place, sample_spec(loaded, sample, labels), "pass --again to sample anew")
    sample_into(folder, sampler, labels, processes, overwrite=again)
    return place


def record_file(samples: Path) -> Path:
    """Where the record of a folder or file of samples is kept by default."""
    return samples / "metrics.json" if samples.is_dir() else samples.with_suffix(".metrics.json")


def record(
    measured: Measured, measure: Measure, images: ImageSet, reference, options: dict, processes: Accelerator
) -> dict:
    """What `metrics.json` holds: the scores, and everything that is needed to repeat them."""
    samples = {"path": images.source, "count": measured.count, "size": measured.size, "fingerprint": images.fingerprint}
    if images.made_by:
        samples["sampling"] = {key: value for key, value in images.made_by.items() if key != "labels"}
    extractors = {
        name: {**facts, **getattr(network := measure.extractors[name], "made_of", {}), "notes": network.notes}
        for name, facts in describe_extractors(measure.extractors).items()
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
    real = None
    if measure.bound and measured.real:
        of_it = {"path": measure.bound.source, "count": measured.real.count, "fingerprint": measure.bound.fingerprint}
        real = {**of_it, "metrics": measured.real.values, "intervals": measured.real.intervals}
    return {
        "metrics": measured.values,
        "intervals": measured.intervals,
        "warnings": measured.warnings,
        "samples": samples,
        "reference": described,
        "bound": real,
        "extractors": extractors,
        "options": options,
        "precision": {"networks": "float32", "tf32": False, "statistics": "float64"},
        **describe_environment(str(processes.device), processes.num_processes),
    }


def save_record(path: Path, content: dict) -> None:
    """Write a record as JSON; a UserError if there is something else at `path`."""
    write_whole(path, json.dumps({"made_by": MARK, **content}, indent=2, default=str) + "\n")
