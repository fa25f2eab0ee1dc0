"""Every kind of part: what it must have, that one's own works in all three ways, and the lists of them."""

from __future__ import annotations

import importlib
import inspect

import make_tables
import own_parts
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from dic_repa import protocols
from dic_repa.alignment import Alignment
from dic_repa.cli import completion
from dic_repa.cli.parts import command, find_registries
from dic_repa.conditions import ClassLabels
from dic_repa.data.autoencoders import load_autoencoder, load_spec
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser
from dic_repa.objectives import DDPM, FlowMatching
from dic_repa.recipe import (
    AlignmentSection,
    DataSection,
    GuidanceSection,
    ModelSection,
    ObjectiveSection,
    SampleSection,
    load_recipe,
)
from dic_repa.recipe.build import (
    build_alignment,
    build_dataset,
    build_decoder,
    build_denoiser,
    build_encoder,
    build_objective,
    data_traits,
)
from dic_repa.recipe.schema import OptimizerSection
from dic_repa.registry import Registry, import_plugin, read_source
from dic_repa.samplers import list_solvers, solver_info
from dic_repa.sampling.sampler import check_sampling
from dic_repa.training.optimizers import build_optimizer
from dic_repa.training.schedules import LearningRate

KINDS = find_registries()
# These have tests of their own: tests/evaluation/test_metrics.py, tests/training/test_trackers.py.
ELSEWHERE = {"metric", "feature-extractor", "tracker"}


def build_own_alignment(**keys) -> Alignment:
    section = AlignmentSection(encoder="own_parts:OwnEncoder", tap="mid.0", head="linear", **keys)
    denoiser = create_denoiser("DiC", 3, 2, width=4, depths=(1,) * 5)
    data, encoder = own_parts.OwnDataSet(16, "train"), own_parts.OwnEncoder()
    alignment = build_alignment(section, encoder, denoiser, data)
    projection = alignment.head(torch.randn(2, 16, 4, 4), torch.rand(2))
    alignment.loss(projection, torch.randn(2, 16, 3), torch.rand(2), alignment.schedule(0))
    return alignment


def alignment_to(teacher: str) -> Alignment:
    denoiser = create_denoiser("DiC", 3, 2, width=4, depths=(1,) * 5)
    return build_alignment(AlignmentSection(teacher=teacher), None, denoiser, own_parts.OwnDataSet(16, "train"))


def draw(**options) -> None:
    objective = build_objective(ObjectiveSection(options=options))
    draws = objective.draw((2, 1, 4, 4), torch.Generator())
    objective.corrupt(torch.zeros(2, 1, 4, 4), **draws)


def draw_samples(objective=None, **keys) -> None:
    check_sampling(SampleSection(steps=4, **keys), objective or FlowMatching())


# How a recipe comes to a part of each kind, by the part's name.
USES = {
    "denoiser": lambda name: build_denoiser(ModelSection(name=name), 3, ClassLabels(2)),
    "block": lambda name: build_denoiser(
        ModelSection(width=4, depths=(1,) * 5, options={"block": name}), 3, ClassLabels(2)
    ),
    "data-set": lambda name: build_dataset(DataSection(name=name, size=4)),
    "autoencoder": lambda name: build_decoder(DataSection(name="images", autoencoder=name)),
    "objective": lambda name: build_objective(ObjectiveSection(name=name)),
    "interpolant": lambda name: draw(path=name),
    "time-sampling": lambda name: draw(time=name),
    "loss-weighting": lambda name: draw(weighting=name),
    "encoder": lambda name: build_encoder(AlignmentSection(encoder=name), torch.device("cpu")),
    "head": lambda name: (
        build_own_alignment()
        and Alignment.build(
            create_denoiser("DiC", 3, 2, width=4, depths=(1,) * 5), "mid.0", 3, (4, 4), (16, 16), head=name
        )
    ),
    "teacher": lambda name: alignment_to(name).teacher.earlier(torch.zeros(1)),
    "target": lambda name: build_own_alignment(target=name),
    "alignment-loss": lambda name: build_own_alignment(loss=name),
    "time-weight": lambda name: build_own_alignment(time_weight=name),
    "alignment-schedule": lambda name: build_own_alignment(schedule=name),
    "optimizer": lambda name: build_optimizer(OptimizerSection(name=name), nn.Linear(1, 1)),
    "learning-rate-schedule": lambda name: LearningRate(load_recipe("digits-urepa", [f"schedule.name={name}"]))(10**5),
    "ode-solver": lambda name: draw_samples(solver=name),
    "sde-solver": lambda name: draw_samples(solver=name),
    "ddpm-solver": lambda name: draw_samples(DDPM(), solver=name),
    "guidance": lambda name: draw_samples(guidance=GuidanceSection(kind=name)),
    "guidance-schedule": lambda name: draw_samples(guidance=GuidanceSection(schedule=name)),
    "time-grid": lambda name: draw_samples(grid={"name": name}),
    "diffusion-form": lambda name: draw_samples(solver="euler_maruyama", diffusion=name),
    "last-step": lambda name: draw_samples(solver="euler_maruyama", last_step=name),
}


def own(kind: str) -> str:
    """The name in `own_parts` of the part of one's own."""
    made = f"Own{KINDS[kind].protocol}"
    return made if hasattr(own_parts, made) else f"own_{kind.replace('-', '_')}"


def offer(folder, monkeypatch, more: str = "") -> None:
    """What pip leaves behind of a package that offers a part of each kind as an entry point."""
    info = folder / "site-packages" / "their_parts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-parts\nVersion: 1.0\n")
    groups = [f"[{KINDS[kind].group}]\ntheir-{kind} = own_parts:{own(kind)}\n{more}\n" for kind in USES]
    (info / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(info.parent)


def test_every_kind_is_used_here_or_elsewhere():
    assert set(USES) | ELSEWHERE == set(KINDS)


@pytest.mark.parametrize("way", ["plugin", "entry point", "module:factory"])
@pytest.mark.parametrize("kind", USES)
def test_a_part_of_ones_own(kind, way, plugin_folder, monkeypatch):
    name = {"plugin": "mine", "entry point": f"their-{kind}", "module:factory": f"own_parts:{own(kind)}"}[way]
    if way == "entry point":
        offer(plugin_folder, monkeypatch)
    if way == "plugin":
        (plugin_folder / "my_plugin.py").write_text(
            "import own_parts\nfrom dic_repa.cli.parts import find_registries\n"
            f"find_registries()[{kind!r}].register('mine')(own_parts.{own(kind)})\n"
        )
        import_plugin("my_plugin")
    own_parts.USED.clear()
    USES[kind](name)
    assert kind in own_parts.USED


@pytest.mark.parametrize("kind", [kind for kind in USES if own(kind).startswith("Own")])
def test_wrong_options_are_one_line(kind):
    with pytest.raises(UserError, match="no_such") as error:
        KINDS[kind].create({"name": f"own_parts:{own(kind)}", "no_such": 1})
    assert "\n" not in str(error.value)


def test_an_autoencoder_of_32_channels(plugin_folder):
    """Its name is what data and checkpoints find it by, whatever its own spec says."""
    assert load_spec("own_parts:OwnAutoencoder").channels == 32
    assert load_autoencoder("own_parts:OwnAutoencoder").spec.name == "own_parts:OwnAutoencoder"
    absent = DataSection(name="prepared", path="nowhere", autoencoder="own_parts:OwnAutoencoder", size=8)
    traits, why = data_traits(absent)
    assert (traits.channels, traits.image_size) == (32, 8 * load_spec("own_parts:OwnAutoencoder").downsample)
    assert "nowhere" in why
    with pytest.raises(UserError, match="own_parts:OwnTarget is no autoencoder: it has no decode and no encode"):
        load_autoencoder("own_parts:OwnTarget")
    (plugin_folder / "own_parts").mkdir()  # a folder of that name is diffusers'
    with pytest.raises(UserError, match="no autoencoder"):
        load_autoencoder("own_parts:vae")


# Options of the parts that are not made without any, and what the parts of a kind are made with.
OPTIONS = {
    "cosine": {"alignment-schedule": {"steps": 5}},
    "stop": {"alignment-schedule": {"steps": 5}},
    "layer-sync": {"teacher": {"tap": "mid.0"}},
    "self-alignment": {"teacher": {"tap": "mid.0"}},
    "stop-at-similarity": {"alignment-schedule": {"similarity": 0.5}},
}
GIVEN = {"head": (4, 4, (2, 2)), "block": (8, 8, 8), "guidance": (0.5,), "encoder": ()}
CALLED_AS_THEY_ARE = {"ode-solver", "sde-solver", "guidance-schedule", "diffusion-form", "last-step"}
# Made where an encoder's weights, data, or a package is on this machine.
NAMES = {
    "autoencoder": ["none"],
    "encoder": ["digits-vit"],
    "data-set": [],
    "denoiser": ["DiC-S", "SiT-S/2", "DiT-S/2", "U-ViT-S/2"],
    "optimizer": ["adamw", "adam", "sgd", "muon"],
}


def lacking(part, protocol) -> list[str]:
    """What `part` has not of what its protocol says, and calls that do not take as many arguments."""
    missing = [name for name in getattr(protocol, "__annotations__", {}) if not hasattr(part, name)]
    for name, member in inspect.getmembers(protocol, inspect.isfunction):
        if name.startswith("_") and name not in ("__call__", "__len__", "__getitem__"):
            continue
        own = part.forward if name == "__call__" and isinstance(part, nn.Module) else getattr(part, name, None)
        if own is None:
            missing.append(name)
            continue
        asked = [p for p in list(inspect.signature(member).parameters.values())[1:] if p.default is p.empty]
        positional = [p for p in asked if p.kind is not p.VAR_KEYWORD]
        try:
            inspect.signature(own).bind(*positional)
        except TypeError:
            missing.append(f"{name} of {len(positional)} arguments")
    return missing


@pytest.mark.parametrize("kind", KINDS)
def test_parts_keep_their_protocol(kind):
    registry, protocol = KINDS[kind], getattr(protocols, KINDS[kind].protocol)
    assert protocol.__doc__ or protocol.__call__.__doc__
    if kind in ELSEWHERE:
        return
    for name in NAMES.get(kind, registry):
        options = OPTIONS.get(name, {}).get(kind, {})
        if kind in CALLED_AS_THEY_ARE and not inspect.isclass(registry.find(name)):
            part = registry.find(name)
            part = (lambda field, x, t, s: x) if hasattr(part, "integrate") else part
        elif kind == "denoiser":
            with torch.device("meta"):
                part = create_denoiser(name, 4, 10)
        elif kind == "optimizer":
            part = registry.create(name, [nn.Parameter(torch.ones(1))], lr=0.1)
        else:
            part = registry.create(name, *GIVEN.get(kind, ()), **options)
        assert not lacking(part, protocol), name
    assert lacking(object(), protocol)


def test_what_takes_all_steps_itself_says_so():
    for name in KINDS["ode-solver"]:
        solver = KINDS["ode-solver"].find(name)
        assert hasattr(solver, "integrate") or callable(solver)
        assert solver_info(name).kind == ("adaptive" if getattr(solver, "adaptive", False) else "fixed")


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("ode-solver", ["ode_solvers:ode_solvers"]),
        ("sde-solver", ["sde:sde_solvers"]),
        ("ddpm-solver", ["ddpm:ddpm_solvers"]),
        ("last-step", ["sde:last_steps"]),
        ("time-grid", ["grids:time_grids"]),
        ("diffusion-form", ["sde:diffusion_forms"]),
        ("guidance-schedule", ["guidance:guidance_schedules"]),
    ],
)
def test_what_is_read_from_the_source_is_what_there_is(kind, sources):
    read: dict[str, str] = {}
    for source in sources:
        module, variable = source.split(":")
        read |= read_source(f"dic_repa.samplers.{module}", variable)
    assert read == {name: KINDS[kind].describe(name) for name in KINDS[kind]}
    assert all(read.values())


def test_every_part_has_a_description():
    for kind, registry in KINDS.items():
        if kind not in ELSEWHERE | {"denoiser", "encoder"}:  # these have richer lists
            assert not [name for name in registry if not registry.describe(name)], kind


def test_kinds_are_completed():
    assert {item.value for item in completion.parts(None, None, "")} >= set(KINDS)


def test_solvers_of_ones_own_by_their_arguments():
    assert solver_info("own_parts:own_ode_solver").process == "ode"
    assert solver_info("own_parts:own_sde_solver").process == "sde"
    assert solver_info("own_parts:OwnDDPMSolver").process == "ddpm"
    with pytest.raises(UserError, match="is a solver for sample_sde; sample_ode takes euler, heun"):
        solver_info("own_parts:own_sde_solver", "ode")
    assert len({info.name for info in list_solvers()}) == len(list_solvers())


def test_parts_as_a_user_lists_them(dic_repa, mistake, tmp_path):
    lines = CliRunner().invoke(command, [], catch_exceptions=False).output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(KINDS)
    (tmp_path / "mine.py").write_text(
        "from dic_repa.alignment import time_weights\n@time_weights.register('ramp')\nclass Ramp:\n"
        '    """It rises with t. And so on."""\n    def __call__(self, t):\n        return t\n'
    )
    listed = dic_repa("parts", "time weight", "--plugin", "mine").stdout
    assert "ramp         It rises with t\n" in listed
    assert "alignments.0.time_weight" in listed
    heun = next(
        line for line in CliRunner().invoke(command, ["ode-solvers"]).output.splitlines() if line.startswith("heun ")
    )
    assert heun.split()[1:3] == ["2", "2"]
    assert "unknown kind of part 'time-wait'; did you mean time-weight" in mistake("parts", "time-wait")


def test_a_broken_package_hides_no_other_part(plugin_folder, monkeypatch):
    offer(plugin_folder, monkeypatch, "broken = own_parts:Missing")
    output = CliRunner().invoke(command, ["ode-solver"], catch_exceptions=False).output
    assert "their-parts 1.0 cannot be loaded from own_parts:Missing" in output
    assert "their-ode-solver" in output
    assert "rk4" in output


def test_the_page_has_the_parts_of_today():
    page = make_tables.PAGE.read_text(encoding="utf-8")
    assert make_tables.with_table(page) == page, "call: python tests/scripts/make_tables.py"
    assert page.count(make_tables.BEGIN) == page.count(make_tables.END) == 1


def test_a_new_file_of_a_package_needs_no_import(tmp_path, monkeypatch):
    house = tmp_path / "house"
    house.mkdir()
    (house / "__init__.py").write_text("")
    (house / "base.py").write_text('from dic_repa.registry import Registry\nrooms = Registry("room", ["house.*"])\n')
    (house / "kitchen.py").write_text('from house.base import rooms\n@rooms.register("kitchen", doors=2)\ndef f(): 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    rooms = importlib.import_module("house.base").rooms
    assert rooms.fact("kitchen", "doors") == 2
    assert rooms.names() == ["kitchen"]
    assert rooms.find("kitchen") is importlib.import_module("house.kitchen").f


def test_a_full_memory_is_not_the_fault_of_the_options():
    def large(size: int):
        raise torch.OutOfMemoryError("CUDA out of memory")

    parts = Registry("part")
    parts.register("large")(large)
    with pytest.raises(torch.OutOfMemoryError):
        parts.create("large", size=3)
