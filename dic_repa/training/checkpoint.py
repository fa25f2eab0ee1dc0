"""All that a stopped run needs to continue exactly: weights, averages, the optimizer's state, the step.

model.safetensors   the denoiser and the heads          ema/            config.json, model.safetensors, recipe.yaml
optimizer.pt        plain tensors, never unpickled                      and data.json: all that sampling needs, also
state.json          the step; what the log has summed up                for `DiC.from_pretrained`
manifest.json       sizes and SHA-256 of all these      ema-0.999/, ... the other averages, with the same files
autoencoder.pt      of an autoencoder that is trained too; its average is in ema/autoencoder/, a folder of diffusers

A thread writes a checkpoint from a copy in CPU memory, and renames it once it is whole; training goes on meanwhile.

Of a sharded run, each process writes what it has of the model and of the optimizer's state into files of its own,
model-00001-of-00008.safetensors and optimizer-00001-of-00008.safetensors, and holds no more (`files/shards.py`). Any
number of processes, sharded or not, load either kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dic_repa.data.autoencoders.spec import PER_CHANNEL
from dic_repa.data.latents import LatentDataset
from dic_repa.data.saved import BESIDE, SavedData
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.manifest import write_manifest
from dic_repa.files.reading import parse_json
from dic_repa.files.shards import Rows, join_rows, open_tensors, tensor_files
from dic_repa.files.weights import WRITE_ERRORS, load_weights, save_tensors, seal
from dic_repa.models.pretrained import CONFIG
from dic_repa.recipe import Recipe, to_yaml
from dic_repa.runs.checkpoints import checkpoint_step, read_run_id
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.progress import say, warn
from dic_repa.training.ema import EMA, PowerEMA
from dic_repa.training.end_to_end import AutoencoderState
from dic_repa.training.log import MetricLog
from dic_repa.training.noise_scale import NoiseScale
from dic_repa.training.optimizers import optimized_names
from dic_repa.training.parts import Parts
from dic_repa.training.shard_writer import Shards, ShardWriter
from dic_repa.training.sharding import cut_like, to_cpu
from dic_repa.training.step import StepGuard
from dic_repa.training.trainable import trainable

MODEL, OPTIMIZER_ROWS = "model.safetensors", "optimizer.safetensors"


@dataclass
class TrainingState:
    """A run's state after `step` steps, copied into CPU memory. Of a sharded run, what this process writes of it:
    tensors are `Rows`, or None.
    """

    step: int
    model: dict[str, Any]
    averages: dict[str, dict[str, Any]]
    optimizer: dict[str, Any]  # its class, its state by its parameters' order, their names, the scaler's state or None
    optimizer_rows: dict[str, Rows]  # what of its state is cut up, as "12.exp_avg"
    config: dict  # of the denoiser
    data: SavedData
    autoencoder: AutoencoderState | None = None  # if it is trained, too
    log: dict[str, Any] = field(default_factory=dict)  # what is not logged yet

    def sets(self, averages: dict[str, EMA], checkpoint: bool) -> dict[str, dict[str, Any]]:
        """What the processes of a sharded run write together for a checkpoint, or else for snapshots alone."""
        if not checkpoint:
            return {name: self.averages[name] for name, ema in averages.items() if isinstance(ema, PowerEMA)}
        return self.averages | {"model": self.model, "optimizer": self.optimizer_rows}


def copy_state(step: int, accelerator: Accelerator, parts: Parts) -> TrainingState | None:
    """What this process writes of the state; None if that is nothing."""
    main = accelerator.is_main_process
    if not (main or parts.sharded):
        return None
    state: dict[int, dict] = to_cpu(parts.optimizer.state_dict()["state"], main)
    rows = {(i, name): each for i, kept in state.items() for name, each in kept.items() if isinstance(each, Rows)}
    for i, name in rows:
        del state[i][name]
    data = SavedData.of(parts.data, parts.condition, parts.data_mean)
    autoencoder = parts.joint.state() if parts.joint else None
    return TrainingState(
        step,
        to_cpu(accelerator.unwrap_model(parts.model).state_dict(), main),
        {name: to_cpu(ema.model.state_dict(), main) for name, ema in parts.averages.items()},
        {
            "class": type(parts.optimizer.optimizer).__name__,
            "parameters": optimized_names(accelerator.unwrap_model(parts.model), parts.optimizer),
            "state": state,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        },
        {f"{i}.{name}": each for (i, name), each in rows.items()},
        parts.ema.config,
        replace(data, autoencoder=autoencoder.spec) if autoencoder else data,
        autoencoder,
    )


def write_checkpoint(folder: Path, state: TrainingState, recipe: Recipe, shards: Shards | None = None) -> None:
    """Write a whole checkpoint at `folder`, or none; of a sharded run, from what all processes have written."""
    with write_aside(folder, "checkpoint") as aside:
        if shards is None:
            save_tensors(state.model, aside / MODEL)
        else:
            for name in (MODEL, OPTIMIZER_ROWS):
                for part in tensor_files(shards.folder / name):
                    part.rename(aside / part.name)
        for name in state.averages:
            (aside / name).mkdir()
            (aside / name / CONFIG).write_text(json.dumps(state.config, indent=2) + "\n")
            (aside / name / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
            state.data.write(aside / name)
            if state.autoencoder:
                state.autoencoder.write(aside / name / BESIDE)
            _write_average(name, state, aside / name / MODEL, shards)
        with (aside / "optimizer.pt").open("wb") as file:  # given its path, torch would not report a full disk
            torch.save(state.optimizer, file)
        if state.autoencoder:
            state.autoencoder.write_resumed(aside)
        (aside / "state.json").write_text(json.dumps({"step": state.step, **state.log}) + "\n")
        known = shards.sha256 if shards else {}
        write_manifest(aside, known=known, run=read_run_id(folder.parents[1]), step=state.step)


def write_snapshots(
    run: RunFolder, state: TrainingState, averages: dict[str, EMA], shards: Shards | None = None
) -> None:
    """Write the power-function averages of this step, from which others can be made after the run."""
    for name, ema in averages.items():
        if isinstance(ema, PowerEMA):
            path = run.snapshots / f"step_{state.step:08d}-{name.removeprefix('ema-')}.safetensors"
            belongs = {"run": read_run_id(run.path) or "", "step": str(state.step)}
            with write_aside(path) as aside:
                _write_average(name, state, aside, shards, belongs)


def _write_average(
    name: str, state: TrainingState, file: Path, shards: Shards | None, belongs: dict[str, str] | None = None
) -> None:
    """Write it whole, since that is what one samples from; with a seal where no manifest says what it `belongs` to."""
    if shards is None:
        tensors = state.averages[name]
        save_tensors(tensors, file, {**belongs, **seal(tensors)} if belongs else None)
        return
    with shards.open(name) as stored:
        join_rows(stored, file, {**belongs, **seal(stored)} if belongs else None)


def _check_statistics(folder: Path, data: Any) -> None:
    """A UserError if the latents have other statistics now than those that they were normalised by."""
    if not (isinstance(data, LatentDataset) and data.spec.normalisation == PER_CHANNEL):
        return
    saved = SavedData.read(folder / "ema")
    then = saved.autoencoder if saved else None
    if then and then.normalisation == PER_CHANNEL and (then.shift, then.scale) != (data.spec.shift, data.spec.scale):
        raise UserError(
            f"the data's latents have other statistics than those that {folder} was trained with, so the run cannot go "
            "on with them; restore the data set, or begin a new run"
        )


def load_checkpoint(folder: Path, accelerator: Accelerator, parts: Parts) -> int:
    """Restore a checkpoint, in every process, and return its step."""
    _check_statistics(folder, parts.data)
    _load(accelerator.unwrap_model(parts.model), folder)
    for name, ema in parts.averages.items():
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no average {name}, so the run cannot go on with it; leave it out")
        _load(ema.model, folder / name)
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    try:
        content = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        step = parse_json((folder / "state.json").read_text())["step"]
        kind = content.get("class", "AdamW")  # the only one that older versions had
        model = accelerator.unwrap_model(parts.model)
        names = optimized_names(model, parts.optimizer)
        known = content.get("parameters", trainable(model))  # older versions had the model's order
        places = {i: names.index(name) for i, name in enumerate(known) if name in names}
        state, scaler = _optimizer_state(content["state"], folder, parameters, places), content["scaler"]
    except UserError:
        raise
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        damage = f"{folder} is damaged ({type(error).__name__})"
        raise UserError(f"{damage}; remove it to resume from the one before") from None
    groups = parts.optimizer.state_dict()["param_groups"]  # the recipe's, which may have been changed
    if kind == type(parts.optimizer.optimizer).__name__:
        parts.optimizer.load_state_dict({"state": state, "param_groups": groups})
    elif accelerator.is_main_process:
        say(f"note: {folder.name} has the state of another optimizer, {kind}; this one starts without a state")
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    if parts.joint:
        parts.joint.load(folder)
    return step


def _optimizer_state(saved: dict, folder: Path, parameters: list[Tensor], places: dict[int, int]) -> dict[int, dict]:
    """The state that `saved` and the files of a sharded run hold, cut up as the parameters are.

    `places` are today's of the parameters that still train, since `train.freeze` may have changed.
    """
    # What has no parameter's shape is left as it is: the step's count, the scales of 8-bit blocks.
    state = {
        places[i]: tree_map_only(Tensor, partial(cut_like, like=parameters[places[i]]), kept)
        for i, kept in saved.items()
        if i in places
    }
    if tensor_files(folder / OPTIMIZER_ROWS):
        with open_tensors(folder / OPTIMIZER_ROWS) as stored:
            for key, value in stored.items():
                i, _, name = key.partition(".")
                if (place := places.get(int(i))) is not None:
                    state[place][name] = cut_like(value, parameters[place])
    return state


def load_log(folder: Path, log: MetricLog, guard: StepGuard, noise: NoiseScale) -> None:
    """Let the log, the count of skipped steps and the noise scale go on; checkpoints of earlier versions have none."""
    try:
        state = parse_json((folder / "state.json").read_text())
        log.restore(state.get("log", {}))
        guard.restore(state.get("skipped", [0, 0]))
        noise.restore(state.get("noise", [0, 0]))
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder}/state.json is damaged ({first_line(error)})") from None


def _load(module: nn.Module, folder: Path) -> None:
    own = module.state_dict()
    with open_tensors(folder / MODEL) as stored:
        tensors = {name: cut_like(each, own.get(name)) for name, each in stored.items()}
    load_weights(module, tensors, folder)


class CheckpointWriter:
    """Writes in a thread, one job at a time: `start` waits for the job before.

    A job that fails costs a warning, and the run goes on; `finish` raises its error if it was the last one. The main
    process starts jobs, and says what fails; those of a sharded run, `shards`, do the same jobs together.
    """

    def __init__(self, run: RunFolder, shards: ShardWriter | None = None):
        self.run, self.shards, self.failure = run, shards, ""
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future | None = None

    def start(self, step: int, write: Callable[[], None]) -> None:
        """Begin to write the state of `step`."""
        self._wait()
        self._job = self._pool.submit(self._work, step, write)

    def finish(self) -> None:
        """Wait for the last job; a UserError where it failed."""
        self._wait()
        if self.failure:
            raise UserError(self.failure)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()  # finish what is being written, even after Ctrl-C in `_wait`
        if self.shards:
            self.shards.close()

    def _wait(self) -> None:
        if self._job is not None:
            self._job.result()  # before Python 3.13, a thread's `join` could not be called again after an interrupt

    def _work(self, step: int, write: Callable[[], None]) -> None:
        self.failure = ""
        try:
            write()
        except (*WRITE_ERRORS, UserError) as error:
            newest = max(self.run.list_checkpoints(), key=checkpoint_step, default=None)
            kept = f"{newest.name} is whole" if newest else "there is no earlier one"
            folder = self.run.checkpoint_path(step)
            cause: BaseException | None = error  # of torch's own error: the system's, such as a full disk's
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            self.failure = f"the checkpoint {folder} could not be written ({first_line(cause or error)}); {kept}"
            if self.shards is None or self.shards.main:
                warn(f"{self.failure}; the run goes on")
