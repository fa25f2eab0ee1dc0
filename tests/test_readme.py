"""The README and the pages of docs/: parts of one's own work as they stand there; commands, recipes and links lead
somewhere. Their Python is run by test_snippets.py."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
import shlex

import click
import pytest
from conftest import TINY
from pages import CODE, PAGES, write_saved_files
from pictures import write_tree
from places import ROOT

from dic_repa.cli import FLAGS, cli, main
from dic_repa.data import datasets
from dic_repa.encoders import list_encoders
from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import extractors
from dic_repa.models import list_denoisers
from dic_repa.recipe import DataSection, EvaluateSection, SampleSection, TrainSection, list_recipes, load_recipe
from dic_repa.samplers import register_solver

BLOCKS = [match.groups() for text in PAGES.values() for match in CODE.finditer(text)]
PROSE = {page: CODE.sub("", text) for page, text in PAGES.items()}
INLINE = sorted({" ".join(code.split()) for text in PROSE.values() for code in re.findall(r"`([^`]+)`", text)})
SMALL = [option for option in TINY if "model." not in option]  # for what is no DiC
SHORT = ["--set=train.steps=2", "--set=evaluate=null"]


def block(language: str, contains: str) -> str:
    (text,) = [text for kind, text in BLOCKS if kind == language and contains in text]
    return text


def commands() -> list[str]:
    """All lines of bash blocks, and the commands in prose that have arguments."""
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip()] + [c for c in INLINE if c.startswith("dic-repa ")]


def dic_repa_arguments(line: str) -> list[str]:
    """Those of `dic-repa` in a line, behind a launcher too; [] where it calls something else."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    for name in ("dic-repa", "dic_repa", "recipes/accelerate/slurm.sh"):
        if name in words[:1] or (name in words and words[0] in ("accelerate", "torchrun", "sbatch")):
            return ["train"] * name.endswith(".sh") + words[words.index(name) + 1 :]
    return []


def commands_of(page_or_recipe: str) -> list[list[str]]:
    lines = block("bash", page_or_recipe).splitlines()
    return [arguments for line in lines if (arguments := dic_repa_arguments(line))]


@pytest.fixture
def here(plugin_folder):
    """Call `dic-repa` with a list of arguments in an empty folder; in this process, since each start costs seconds."""

    def run(arguments):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0

    return run


@pytest.mark.slow
def test_plugging_in_an_encoder(here, tmp_path):
    write_saved_files(tmp_path, "my_encoder.py", "my_recipe.yaml")
    ((verb, recipe),) = commands_of("my_recipe.yaml")
    here([verb, recipe, *TINY, "--set=model.depths=[1,1,2,1,1]", *SHORT])
    line = (tmp_path / "runs/my_recipe/metrics.jsonl").read_text()
    assert "alignment.0.token" in line
    assert "alignment.1.token" in line


def test_naming_a_class_of_ones_own(here, tmp_path):
    write_saved_files(tmp_path, "my_encoder.py", "my_head.py", "my_head.yaml")
    here(["train", "my_head.yaml", *TINY, *SHORT])
    assert "alignment.0.token" in (tmp_path / "runs/my_head/metrics.jsonl").read_text()


def test_a_denoiser_of_ones_own(here, tmp_path):
    write_saved_files(tmp_path, "my_model.py", "my_model.yaml")
    train, sample = commands_of("my_model.yaml")
    here([*train, *SMALL, *SHORT])
    assert "alignment.0.token" in (tmp_path / "runs/my_model/metrics.jsonl").read_text()
    here([*sample, "--num=4"])
    assert len(list((tmp_path / "samples").rglob("0*.png"))) == 4
    (config,) = (tmp_path / "runs/my_model").glob("checkpoints/*/ema/config.json")
    assert json.loads(config.read_text())["width"] == 12


def test_a_data_set_with_vectors(here, tmp_path):
    write_saved_files(tmp_path, "my_vectors.py", "my_vectors.yaml")
    train, sample = commands_of("my_vectors.yaml")
    here([*train, *TINY, *SHORT])
    here([*sample, "--num=4", "--classes=bottom right"])
    assert len(list((tmp_path / "samples").rglob("0*.png"))) == 4


def test_a_data_set_of_ones_own(here, tmp_path):
    write_saved_files(tmp_path, "my_data.py", "my_data.yaml")
    train, sample = commands_of("my_data.yaml")
    here([*train, *TINY, *SHORT])
    assert "alignment.0.token" in (tmp_path / "runs/my_data/metrics.jsonl").read_text()
    here([*sample, "--num=4", "--classes=1"])
    assert len(list((tmp_path / "samples").rglob("0*.png"))) == 4


def test_pixels_of_ones_own(here, tmp_path):
    write_tree(tmp_path / "pictures", {"night": 3, "day": 3}, size=(72, 64))
    write_saved_files(tmp_path, "mine.yaml", "mine-pixels.yaml")
    prepare, train, sample = commands_of("mine-pixels.yaml")
    here(prepare)
    assert json.loads((tmp_path / "data/pixels/prepare.json").read_text())["class_names"] == ["day", "night"]
    here([*train, *TINY, "--set=train.batch_size=2", *SHORT])
    here([*sample, "--num=2", "--steps=1"])
    assert len(list((tmp_path / "samples").rglob("0*.png"))) == 2


def test_an_objective_of_ones_own(here, tmp_path):
    write_saved_files(tmp_path, "my_objective.py", "my_objective.yaml")
    here(["train", "my_objective.yaml", *TINY, *SHORT])
    (line,) = (tmp_path / "runs/my_objective/metrics.jsonl").read_text().splitlines()
    assert "alignment.0.token" in line
    here(["sample", "runs/my_objective", "--num=4", "--steps=3", "--trust-code"])
    assert len(list((tmp_path / "samples").rglob("0*.png"))) == 4


def test_a_solver_of_ones_own(here, tmp_path):
    write_saved_files(tmp_path, "my_solver.py", "my_solver.yaml")
    here(["train", "my_solver.yaml", *TINY, *SHORT])
    here(["sample", "runs/my_solver", "--num=4", "--steps=3", "--trust-code"])
    images = {}
    for solver in ("my-midpoint", "midpoint"):
        options = ["--num=4", "--steps=3", f"--solver={solver}", f"--out={solver}"]
        here(["sample", "runs/my_solver", *options, "--trust-code"])
        images[solver] = [file.read_bytes() for file in sorted((tmp_path / solver).glob("0*.png"))]
    assert len(images["midpoint"]) == 4
    assert images["my-midpoint"] == images["midpoint"]  # torchdiffeq's
    with pytest.raises(UserError, match="solver 'midpoint' is registered already"):
        register_solver("midpoint")(lambda field, x, t, s: x)


@pytest.mark.slow
def test_small_parts_of_ones_own(here, tmp_path):
    write_saved_files(tmp_path, "my_parts.py", "my_parts.yaml")
    here(["train", "my_parts.yaml", *TINY, *SHORT])
    here(["sample", "runs/my_parts", "--num=4", "--trust-code"])
    assert len(list((tmp_path / "samples").rglob("0*.png"))) == 4


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_exist(line, tmp_path):
    """A dic-repa command has options and values that its verb takes; its recipes exist and take its overrides."""
    arguments = dic_repa_arguments(line)
    command, names = cli, []
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
        command = command.get_command(None, names[-1])
        assert command is not None, f"{names}: no such verb"
    if not arguments or "--help" in arguments:  # no command of ours, or a verb alone
        return
    params = command.make_context(names[-1], [word for word in arguments if word not in FLAGS]).params
    write_saved_files(tmp_path)
    for shown, saved in re.findall(r"dic-repa recipes show (\S+)(?: --comments)? > (\S+)", "\n".join(commands())):
        (tmp_path / saved).write_text(f"base: {shown}\n")
    for recipe in recipes_of(names, params):
        load_recipe(tmp_path / recipe if recipe.endswith(".yaml") else recipe, params.get("overrides", ()))


def recipes_of(verb: list[str], params: dict) -> list[str]:
    """The recipes that a command names, but for those of a finished run and those with a shell's variable in them."""
    named = [params[key] for key in ("recipe", "recipe_name", "a", "b") if params.get(key)]
    if verb in (["bench", "train"], ["bench", "sample"]):
        named += params["recipes"]
    return [recipe for recipe in named if not re.search(r"[$/]|^RECIPE$", recipe)]


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "yaml"])
def test_recipes_are_valid(text, tmp_path):
    write_saved_files(tmp_path)
    (tmp_path / "block.yaml").write_text(text)
    load_recipe(tmp_path / "block.yaml")


def test_names_in_prose():
    """Recipes, and keys of recipes, that are named in the text."""
    known = {*list_recipes(), *list_encoders(), *datasets.names(), *list_denoisers(), *extractors.names()}
    sections = {"train": TrainSection, "data": DataSection, "sample": SampleSection, "evaluate": EvaluateSection}
    looked_at = 0
    for code in INLINE:
        for word in set(code.split()) - {"dic-repa"}:
            if re.fullmatch(r"(dic|dico|fcdm|sit|dit|u-vit|digits|ladder|urepa|sample|dinov2)-[\w.*-]+", word):
                assert fnmatch.filter(known, word), code
                looked_at += 1
        if (key := re.match(r"(\w+)\.(\w+)\b(?!/)", code)) and key[1] in sections and key[2] not in ("json", "py"):
            assert key[2] in sections[key[1]].model_fields, code
            looked_at += 1
        if re.fullmatch(r"(recipes|tests|docs|dic_repa|examples)/[\w./-]+\.\w+", code):
            assert (ROOT / code).is_file(), code
            looked_at += 1
    assert looked_at > 50


def test_scripts_exist():
    lines = [line for line in [*commands(), *INLINE] if not dic_repa_arguments(line)]
    found = 0
    for line in lines + [line for line in commands() if line.startswith(("accelerate", "sbatch"))]:
        for word in line.split():
            if re.match(r"(recipes|tests|examples)/[\w./-]+\.(py|sh|yaml)", word):
                assert (ROOT / word.partition(":")[0]).is_file(), line
                found += 1
        if module := re.match(r"python -m (dic_repa[\w.]+)", line):
            assert importlib.util.find_spec(module[1]), line
            found += 1
    assert found > 8


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE[page])
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.resolve().is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_the_readme_leads_to_every_page():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in PAGES["README.md"]


def test_the_gallery_has_every_picture():
    pictures = [path.name for path in (ROOT / "recipes/results").glob("*.png")]
    assert len(pictures) > 10
    assert not [name for name in pictures if f"](../recipes/results/{name})" not in PAGES["docs/gallery.md"]]
