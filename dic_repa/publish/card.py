"""The card of a model, README.md on the hub: metadata by huggingface_hub, and a page that says what the model is.

Names come from runs of strangers, so every text from a recipe or a record goes through `plain`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dic_repa.data.autoencoders import autoencoders
from dic_repa.data.saved import SavedData
from dic_repa.encoders import encoder_licence
from dic_repa.errors import printable
from dic_repa.evaluation.measuring import FULL_COUNT
from dic_repa.evaluation.metrics import find_metric, title
from dic_repa.publish.scores import Scored, Scores
from dic_repa.recipe import AlignmentSection, Recipe, SampleSection
from dic_repa.runs.folder import RunFolder
from dic_repa.sampling.load import Checkpoint
from dic_repa.sampling.weights import home_of
from dic_repa.trust import names_code

CARD, GRID = "README.md", "grid.png"
TASK = "unconditional-image-generation"  # the hub's nearest one, with classes too
HUB_DATA = {"digits": "ylecun/mnist"}  # data sets of the package that are on the hub
PAPERS = {"DiC": "https://arxiv.org/abs/2501.00603", "U-REPA": "https://arxiv.org/abs/2503.18414"}


@dataclass(frozen=True)
class Page:
    """All that a card tells of: a model, its recipe and data as they are published, and its scores."""

    model: Checkpoint
    recipe: Recipe
    data: SavedData | None
    scores: Scores
    repository: str  # 'owner/name'
    licence: str | None
    revision: str | None = None
    changed: bool = False  # since it was loaded
    has_grid: bool = True
    taken: str = ""  # of the weights that it started from

    @property
    def kind(self) -> str:
        return type(self.model.denoiser).__name__

    @property
    def pictures(self) -> str:
        """'images of 256x256 pixels'; of a model that does not say behind which autoencoder it was trained, latents."""
        spec, side = self.data and self.data.autoencoder, self.recipe.data.size
        channels = self.model.denoiser.in_channels
        if spec or channels in (1, 3):
            side *= spec.downsample if spec else 1
            return f"images of {side}x{side} pixels"
        return f"latents of {channels}x{side}x{side}"

    @property
    def needs_code(self) -> bool:
        return names_code(self.recipe.model_dump(mode="json"))


def plain(text: object, most: int = 300) -> str:
    """Any text as one line that Markdown shows as it is: no markup, no HTML, no link, no end of a table's cell."""
    line = html.escape(printable(" ".join(str(text).split()), most), quote=False)
    line = re.sub(r"([\\`*_{}\[\]#~!])", r"\\\1", line).replace("|", "&#124;").replace("$", "&#36;")
    return line.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


def model_card(page: Page) -> str:
    """README.md: the metadata, then the page. It is what huggingface_hub makes of it, read once more."""
    sections = {
        "How to sample": _how_to_sample(page),
        "How it was trained": _training(page),
        "Scores": _scores(page),
        "Limits": "\n".join(f"- {line}" for line in _limits(page)),
        "Licence": _licence(page),
    }
    body = f"# {page.repository.partition('/')[2]}\n\n{_what_it_is(page)}\n"
    body += f"\n![Samples]({GRID})\n" if page.has_grid else ""
    body += "".join(f"\n## {heading}\n\n{text}\n" for heading, text in sections.items())
    return str(ModelCard(f"---\n{metadata(page).to_yaml()}\n---\n\n{body}"))


def metadata(page: Page) -> ModelCardData:
    """What the hub reads: licence, library, task, tags, data and scores with their protocol."""
    taught = any(section.encoder for section in page.recipe.alignments)
    aligned = ["representation-alignment", "u-repa"] if taught else []
    tags = ["dic-repa", "diffusion", "image-generation", page.kind.lower(), page.recipe.objective.name, *aligned]
    results = [result for scored in page.scores.scored for result in _results(scored)]
    known, begun = HUB_DATA.get(page.recipe.data.name), page.recipe.train.init_from
    from_hub = begun in RunFolder(home_of(page.model.source)).downloads()  # else it was a path here
    return ModelCardData(
        base_model=begun.partition("@")[0] if begun and from_hub else None,
        license=page.licence,
        library_name="dic-repa",
        pipeline_tag=TASK,
        tags=[tag for tag in tags if re.fullmatch(r"[\w.-]+", tag)],
        datasets=[known] if known else None,
        model_name=page.repository.partition("/")[2] if results else None,
        eval_results=results or None,
    )


def _results(scored: Scored) -> Iterator[EvalResult]:
    name, _, split = scored.reference.partition(":")
    for metric, value in scored.metrics.items():
        yield EvalResult(
            task_type=TASK,
            dataset_type=re.sub(r"[^\w.-]+", "-", name) or "unknown",  # the hub takes no other characters
            dataset_name=scored.reference,
            dataset_split=split or None,
            metric_type=metric,
            metric_name=title(metric),
            metric_value=round(value, 6),
            metric_args=protocol(scored),
        )


def protocol(scored: Scored) -> dict[str, Any]:
    """How the samples were drawn, in the keys of a recipe."""
    sample, guidance = scored.sample, scored.sample.guidance
    keys = ["solver", *SampleSection.solver_keys(), "classes", "seed", "weights", "precision"]
    given = {
        key: value for key, value in sample.model_dump(mode="json", include=set(keys)).items() if value is not None
    }
    ordered = {key: given[key] for key in keys if key in given}
    guided: Any = "none"
    if guidance:
        changed = guidance.model_dump(mode="json", exclude_defaults=True, exclude={"doubled"})
        guided = {"kind": guidance.kind, "scale": guidance.scale, "interval": list(guidance.interval)} | changed
    return {"num": scored.num, **ordered, "evaluations": scored.evaluations, "guidance": guided}


def _what_it_is(page: Page) -> str:
    condition = page.model.condition
    size = sum(parameter.numel() for parameter in page.model.denoiser.parameters())
    known = "no condition" if condition.kind == "none" else condition.describe()
    by = [f"[{name}]({PAPERS[name]})" for name in ("DiC", "U-REPA") if name in (page.kind, *_aligned(page))]
    text = (
        f"A {plain(page.kind)} of {size / 1e6:.4g} M parameters that draws {page.pictures} ({known}), trained on "
        f"{plain(page.recipe.data.name)}. It is a model for dic-repa"
    )
    text += f", after the papers {' and '.join(by)}." if by else "."
    return text + (f"\n\nIts recipe: {plain(page.recipe.description)}." if page.recipe.description else "")


def _aligned(page: Page) -> list[str]:
    taught = [section for section in page.recipe.alignments if section.encoder]
    return ["U-REPA"] if any(_words(section.loss).startswith("u-repa") for section in taught) else []


def _how_to_sample(page: Page) -> str:
    name = page.repository + (f"@{page.revision}" if page.revision else "")
    trust, flag = (", trust_code=True", " --trust-code") if page.needs_code else ("", "")
    return f"""With dic-repa installed, PIL images from Python

```python
from dic_repa import load

images = load("{name}"{trust}).sample({_classes(page)}, seed=0)
```

or PNG files from the command line:

```bash
dic-repa sample {name} --num 10{flag}
```

Solver, steps and guidance are those of [recipe.yaml](recipe.yaml) unless you name others."""


def _classes(page: Page) -> str:
    """Two classes to ask for, by names that are safe in code, or else by numbers."""
    condition = page.model.condition
    if condition.kind != "classes" or not condition.count or page.recipe.train.label_dropout == 1:
        return "num=10"
    names = list(condition.names[:2])
    safe = all(re.fullmatch(r"[A-Za-z0-9][\w -]{0,40}", name, flags=re.ASCII) for name in names)
    return f"classes={json.dumps(names if safe else list(range(len(names))))}"


def _training(page: Page) -> str:
    recipe, train = page.recipe, page.recipe.train
    done = f"{page.scores.step} of {train.steps}" if page.scores.step is not None else f"{train.steps} in the recipe"
    weights = {"ema": f"averaged, decay {round(train.sampled_decay, 8)}", "raw": "not averaged", "": "see the recipe"}
    rows = {
        "recipe": "[recipe.yaml](recipe.yaml), every key",
        "objective": plain(_words(recipe.objective)),
        "data": f"{plain(recipe.data.name)}{_behind(page.data)}; {page.model.condition.describe()}",
        "steps": f"{done}, of {train.batch_size} images each, in {train.precision.replace('no', 'float32')}",
        "optimizer": f"{plain(_words(recipe.optimizer))}, learning rate {recipe.optimizer.learning_rate:g}, schedule "
        f"{plain(recipe.schedule.name)}",
        "label dropout": f"{train.label_dropout:g}",
        "weights": weights.get(page.scores.weights, plain(page.scores.weights)),
    }
    if train.init_from:
        taken = f" ({plain(page.taken)})" if page.taken else ""
        rows["started from"] = f"the weights {plain(train.init_from)}{taken}"
    if train.lora:
        rows["trained were"] = f"LoRA adapters of rank {train.lora.rank}, merged into the weights here"
    elif train.freeze:
        rows["left as they were"] = plain(", ".join(train.freeze))
    aligned = [_alignment(section) for section in recipe.alignments] or ["nothing"]
    return _table(["what", "how"], [*map(list, rows.items()), *(["aligned to", text] for text in aligned)])


def _behind(data: SavedData | None) -> str:
    if data and data.beside:
        return ", latents of an autoencoder that was trained with it ([autoencoder](autoencoder))"
    spec = data and data.autoencoder
    return f", latents of the autoencoder {plain(spec.name)}" if spec and spec.name != "none" else ""


def _alignment(section: AlignmentSection) -> str:
    if section.encoder is None:
        return f"{plain(section.taught_by)} at {plain(section.tap)}, weight {section.weight:g}: no encoder"
    licence = encoder_licence(section.encoder) or "not known here: ask who published them"
    own = ", from a file of its own" if section.encoder_options.get("weights") else ""
    return (
        f"{plain(section.encoder)}{own} (licence of its weights: {plain(licence)}) at {plain(section.tap)}, "
        f"weight {section.weight:g}, loss {plain(_words(section.loss))}, target {plain(_words(section.target))}"
    )


def _words(part: Any) -> str:
    """A part of a recipe in a word: a name, or the name in a section or a mapping."""
    return str(part.get("name", part) if isinstance(part, dict) else getattr(part, "name", part))


def _scores(page: Page) -> str:
    if page.changed:
        return "None: the weights were changed after they had been loaded, and no score is of these."
    if not page.scores.scored:
        return "None were recorded for these weights."
    parts = []
    for scored in page.scores.scored:
        rows = []
        for name, value in scored.metrics.items():
            metric = find_metric(name)
            head = f"{title(name)} ({metric.better} is better)" if metric else name
            rows.append([plain(head), f"{value:.4g}", f"{scored.real[name]:.4g}" if name in scored.real else ""])
        parts.append(f"{_drawn(scored)}\n\n{_table(['metric', 'this model', 'real images'], rows)}")
    return "\n\n".join([*parts, "All of it, for programs: [scores.json](scores.json)."])


def _drawn(scored: Scored) -> str:
    """The protocol in words."""
    content = protocol(scored)
    num, guidance = content.pop("num"), content.pop("guidance")
    words = ", ".join(f"{key} {value}" for key, value in content.items() if value is not None)
    guided = guidance if guidance == "none" else " ".join(f"{key} {value}" for key, value in guidance.items())
    return f"{num} samples ({plain(words)}, guidance {plain(guided)}), compared with {plain(scored.reference)}:"


def _limits(page: Page) -> Iterator[str]:
    recipe, scored = page.recipe, page.scores.scored
    spec = page.data and not page.data.beside and page.data.autoencoder
    if page.model.source.is_file():  # a file of the authors' code
        yield f"Its weights come from {plain(page.model.source.name)}, which other code made; the recipe was added."
    yield f"It draws what its training data shows, as {page.pictures}, with the faults of that data."
    if page.scores.step is not None and page.scores.step < recipe.train.steps:
        yield f"Training stopped at step {page.scores.step} of {recipe.train.steps}."
    if any(each.num < FULL_COUNT for each in scored):
        yield f"Scores of fewer than {FULL_COUNT:,} samples do not compare with published ones."
    yield from map(plain, dict.fromkeys(note for each in scored for note in each.notes))
    yield "Whether samples are copies of training pictures is not said here; `dic-repa nearest` measures it."
    if spec and spec.name not in autoencoders:  # else its name is enough
        yield f"The autoencoder {plain(spec.name)} is not in this repository; `--autoencoder` names where it is."
    if recipe.sample.guidance and recipe.sample.guidance.weak:
        yield "Its recipe guides by a weaker model, which is not in this repository: choose another guidance."
    if page.needs_code:
        yield "Its recipe names code that is not in this repository: ask its author, and read it before you trust it."


def _licence(page: Page) -> str:
    words = [
        f"The weights: `{page.licence}`, as their author says."
        if page.licence
        else "Their author has not said under which licence the weights are: ask before you use them."
    ]
    reaching = ["the training data"]
    if any(section.encoder for section in page.recipe.alignments):
        words.append("The frozen encoder was used in training alone and is not in this repository.")
        reaching.append("the encoder")
    if page.recipe.train.init_from:
        reaching.append("the weights that it started from")
    return " ".join([*words, f"The terms of {' and of '.join(reaching)} may reach the weights too."])


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
