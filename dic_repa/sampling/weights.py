"""Where a run's weights are, and what is read of them: of its newest checkpoint, another one, a further average."""

import re
from pathlib import Path

from torch import Tensor

from dic_repa.errors import UserError, did_you_mean
from dic_repa.files.manifest import MANIFEST, check_whole, find_damage
from dic_repa.files.outputs import AUTHORS_FILES
from dic_repa.files.shards import tensor_files
from dic_repa.files.weights import load_weights, read_tensors, weights_fingerprint
from dic_repa.models import load_denoiser
from dic_repa.models.adapters import is_adapter, merge
from dic_repa.models.pretrained import CONFIG, WEIGHTS, Pretrained
from dic_repa.recipe import LoraSection, SampleSection, load_training_recipe
from dic_repa.runs.checkpoints import RAW, checkpoint_step, find_stranger
from dic_repa.runs.folder import RunFolder, suggest_runs
from dic_repa.runtime.progress import detail


def weights_folder(path: str | Path) -> Path:
    """The folder of the weights that `load` takes from `path`; a UserError if they are damaged."""
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; {_folder_of(path)}")
    if not path.is_dir():
        raise UserError(f"there is no run or checkpoint folder {path}{suggest_runs(path)}")
    folder = path
    is_run = (path / "recipe.yaml").is_file() and not (path / CONFIG).is_file()
    if is_run or (path / "checkpoints").is_dir():
        newest = RunFolder.open(path).newest_checkpoint("ema")
        if newest is None:
            raise UserError(f"{path} has no checkpoint yet")
        folder = newest
    average = folder / "ema"
    is_average = average.is_dir() and not (average / "checkpoints").is_dir()  # that would be a run of this name
    found = average if is_average else folder
    check_whole(found)
    if stranger := find_stranger(checkpoint_of(found)):
        raise UserError(f"{checkpoint_of(found)} is not what its place says: {stranger}; move it to where it belongs")
    return found


def checkpoint_of(weights: Path) -> Path:
    """The training checkpoint that holds a folder of averaged weights, with links followed; else this folder."""
    weights = weights.resolve()  # checkpoints/best is a link
    ours = any((weights.parent / name).is_file() for name in (WEIGHTS, "state.json"))  # WEIGHTS may be in parts
    return weights.parent if ours else weights


def home_of(weights: Path) -> Path:
    """The run that holds a checkpoint's weights; the checkpoint itself if it is in no run."""
    checkpoint = checkpoint_of(weights)
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint


def read_weights(folder: Path, name: str) -> tuple[Pretrained, Path]:
    """The denoiser with the weights `name` of the checkpoint that `weights_folder` has found, and where these are."""
    source = folder if name == "ema" else _other_weights(folder, name)
    detail(f"weights: {source}")
    if name != RAW:
        return load_denoiser(source), source
    denoiser, tensors = load_denoiser(folder), read_raw(source)
    if any(map(is_adapter, tensors)):
        lora = lora_of(folder)
        tensors = merge(tensors, lora.alpha / lora.rank)
    load_weights(denoiser, tensors, source / WEIGHTS)
    return denoiser, source


def read_raw(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of the denoiser itself in a training checkpoint, which also has those of the heads."""
    prefix, tensors = "denoiser.", read_tensors(checkpoint / WEIGHTS)[0]
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def lora_of(folder: Path) -> LoraSection:
    """By what the adapters were trained whose merged average is in `folder`; a UserError if its recipe has none."""
    file = folder / "recipe.yaml"
    lora = load_training_recipe(file, only_read=True).train.lora if file.is_file() else None
    if lora is None:
        raise UserError(f"{folder} has no recipe.yaml with train.lora, so it has no adapters")
    return lora


def _other_weights(ema: Path, name: str) -> Path:
    """The folder of the weights `name` in the checkpoint that the folder `ema` is in."""
    checkpoint = ema.parent
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{ema} has only one set of weights, not the weights '{name}'; leave --weights out")
    there = [RAW, *sorted(file.parent.name for file in checkpoint.glob(f"ema*/{CONFIG}"))]
    if name not in there:
        raise UserError(f"{checkpoint} has no weights '{name}'{did_you_mean(name, there)}")
    raw = [file.name for file in tensor_files(checkpoint / WEIGHTS)] or [""]  # something is missing: look at all
    for part in raw if name == RAW else [name]:
        if damage := find_damage(checkpoint, part):
            raise UserError(f"{checkpoint} is damaged: {damage}")
    return checkpoint if name == RAW else checkpoint / name


def _folder_of(file: Path) -> str:
    """A hint what to name instead of a file."""
    if (file.parent / CONFIG).is_file():
        return f"name its folder, {file.parent}"
    if file.suffix in AUTHORS_FILES:
        return "`dic-repa convert` makes a folder of the authors' weights, to sample from"
    return "name the folder of a run or a checkpoint"


def in_same_run(weak: str) -> bool:
    """Whether a `guidance.weak` is in the run of the model that it guides, not a path or a hub id."""
    return re.fullmatch(r"earlier|0?\.\d+|step_\d+|ema-[^/]+", weak) is not None


def find_weak(weak: str, source: Path) -> str | Path:
    """What to load for the `guidance.weak` of the model whose weights are in `source`: a path or hub id as it is, a
    run's name also beside the model's run.

    Raises:
        UserError: it names another checkpoint or average of the same run, and there is none.
    """
    checkpoint, home = checkpoint_of(source), home_of(source)
    if not in_same_run(weak):
        beside = home.parent / weak
        return beside if not Path(weak).exists() and beside.is_dir() else weak
    if home == checkpoint:
        raise UserError(f"guidance.weak '{weak}': {source} is in no run's folder; name a run or checkpoint instead")
    if weak.startswith("ema-"):
        return _other_weights(checkpoint / "ema", weak)
    found = RunFolder(home).another_checkpoint(weak, checkpoint_step(checkpoint))
    if found is None:
        which = f"{weak} beside it" if weak.startswith("step_") else f"checkpoint before {checkpoint.name}"
        raise UserError(
            f"guidance.weak '{weak}': {home / 'checkpoints'} has no whole {which}; train with train.keep_every to keep "
            "earlier ones, or name another run or checkpoint"
        )
    return found


def weak_weights(settings: SampleSection, source: Path) -> dict[str, str]:
    """The fingerprint of the weaker model that `settings` guide the model in `source` with, if any: its path may hold
    other weights later."""
    weak = settings.guidance and settings.guidance.weak
    return {"weak_weights": weights_fingerprint(weights_folder(find_weak(weak, source)) / WEIGHTS)} if weak else {}
