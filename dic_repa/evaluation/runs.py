"""Judging a run: sample from its averaged weights, measure, and keep both beside the run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.judging import Judge, own_encoder
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK, check_file
from dic_repa.files.pictures import save_grid, shown_in_grid
from dic_repa.recipe import GuidanceSection, Recipe, SampleSection
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.folder import RunFolder
from dic_repa.runs.listing import current_names
from dic_repa.sampling.labels import draw_labels
from dic_repa.sampling.load import load, weak_weights

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
        return self.record.with_name(self.record.name.removesuffix(".json") + ".png")

    def identity(self) -> dict:
        """What a record of the same judgement has in common with this one."""
        names = self.recipe.evaluate.names if self.recipe.evaluate else ()
        metric, sample = "+".join(names), self.sample.model_dump(mode="json")
        return {"step": self.step, "metric": metric, "sample": sample, **weak_weights(self.sample)}

    def read(self) -> bool:
        """Take the scores from the record of the same judgement, if there is one and it is whole."""
        with contextlib.suppress(OSError, ValueError):
            record, wanted = json.loads(self.record.read_text()), self.identity()
            if {key: record.get(key) for key in wanted} == wanted:
                self.scores, self.evaluations = current_names(record["scores"]), record["evaluations"]
                return True
        return False

    def save(self, images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
        """Write the picture of the samples and the record of their scores."""
        save_grid(images, self.picture, labels, class_names, COLUMNS)
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load(newest, device, weights=sample.weights)
    labels = draw_labels(recipe, checkpoint.condition, sample)
    sampler = checkpoint.sampler(sample)
    rows = shown_in_grid(labels, COLUMNS)
    shown: dict[int, Tensor] = {}
    judge = Judge(recipe.evaluate.names, recipe.evaluate.reference, device, own_encoder(recipe))
    judged.scores = judge(_keep_rows(sampler(labels), rows, shown, progress), labels)
    judged.evaluations = sampler.evaluations
    judged.save(torch.stack([shown[i] for i in rows]), labels[rows], checkpoint.condition.names)
    return judged


def no_judge(path: str | Path, hint: str = "") -> UserError:
    """The error for a run whose recipe does not say how to judge its samples."""
    hint = hint or f"add one to {Path(path) / 'recipe.yaml'}, such as `evaluate: {{metric: fid, reference: FOLDER}}`"
    return UserError(f"the recipe of {path} has no `evaluate` section to say how to judge it; {hint}")


def _keep_rows(
    batches: Iterable[Tensor], rows: Sequence[int], shown: dict[int, Tensor], progress: Callable[[int], object]
) -> Iterator[Tensor]:
    """The batches; the images of `rows` are put into `shown` on the way."""
    start = 0
    for batch in batches:
        shown.update({i: batch[i - start].clone() for i in rows if start <= i < start + len(batch)})
        start += len(batch)
        progress(len(batch))
        yield batch


def describe_sampling(sample: SampleSection) -> str:
    """'500 heun 20', and behind it all that is no default, as in 'cfg 1.8 0.0 0.7': short enough for a file's name."""
    words = [sample.num, sample.solver] + ([sample.steps] if sample.steps else [])
    if sample.classes == "random":
        words.append("random classes")
    if sample.pixels == "truncate":
        words.append("truncated")
    if sample.weights != "ema":
        words += ["weights", sample.weights]
    if sample.seed:
        words += ["seed", sample.seed]
    for key in SampleSection.solver_keys():
        if key not in ("steps", "grid", "options") and getattr(sample, key) is not None:
            words += [key, getattr(sample, key)]
    if sample.grid:
        words += [sample.grid.name, *sample.grid.options.values(), *(sample.grid.times or ())]
    if guidance := sample.guidance:
        words += [guidance.kind, guidance.scale, *guidance.interval]
        for key in ("channels", "schedule", "rescale", "weak"):
            if getattr(guidance, key) != GuidanceSection.model_fields[key].default:
                words += [key, str(getattr(guidance, key)).replace("/", "-")]
    return " ".join(str(word) for word in words)
