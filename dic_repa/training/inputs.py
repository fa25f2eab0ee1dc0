"""The batches of a run, and the randomness of its steps.

A step has a global batch; each process has a share of it, and goes through its share in one or several passes.

All randomness comes from (seed, step), drawn for the global batch and then sliced. So nothing random is saved in a
checkpoint, a resumed run equals an uninterrupted one, and the number of processes changes nothing.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from dic_repa.errors import UserError, print_rank_errors
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.runtime.progress import warn
from dic_repa.training.preemption import ignore_signals

PREFETCH = 4  # batches that each loader process has ready: they bridge a slow read from a disk or a network


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator from which `step` draws times, noise, dropped labels and the posterior's noise, in this order."""
    return torch.Generator(device).manual_seed(_stream(seed, "step") + step)


def data_order(seed: int, count: int, batch_size: int, start_step: int = 0) -> Iterator[list[int]]:
    """Endless global batches of indices into a data set of `count` samples, from the batch of `start_step` on.

    The data is one stream of epochs, each with its own permutation; a batch may span two, so no epoch is cut short.
    """
    position = start_step * batch_size
    while True:
        stream = range(position, position + batch_size)
        yield [_permutation(seed, p // count, count)[p % count] for p in stream]
        position += batch_size


def process_rows(batch_size: int, process: int, processes: int) -> slice:
    """The rows of the global batch that belong to `process`."""
    share = batch_size // processes
    return slice(process * share, (process + 1) * share)


@functools.lru_cache(maxsize=2)  # a batch spans at most two epochs, unless it is larger than the data
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(_stream(seed, "data") + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _stream(seed: int, name: str) -> int:
    """A start for each stream, far from those of other seeds, to which a step or an epoch is added."""
    digest = hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def check_batch(settings: TrainSection, processes: int) -> int:
    """How many passes make one step of one process; a UserError where the global batch does not divide evenly."""
    if settings.batch_size % processes:
        fewer = max(n for n in range(1, processes + 1) if settings.batch_size % n == 0)
        larger = -(-settings.batch_size // processes) * processes
        raise UserError(
            f"train.batch_size {settings.batch_size} does not divide among {processes} processes; start {fewer}, "
            f"or set train.batch_size={larger}, which changes the run"
        )
    share = settings.batch_size // processes
    micro_batch = min(settings.micro_batch or share, share)
    if share % micro_batch:
        raise UserError(
            f"train.micro_batch {settings.micro_batch} does not divide the {share} images that each of {processes} "
            f"processes has of train.batch_size {settings.batch_size}"
        )
    return share // micro_batch


def batches(data, recipe: Recipe, accelerator: Accelerator, start: int) -> Generator[dict[str, Tensor], None, None]:
    """This process's rows of the global batches from step `start` on, on the device."""
    settings = recipe.train
    rows = process_rows(settings.batch_size, accelerator.process_index, accelerator.num_processes)
    order = data_order(settings.seed, len(data), settings.batch_size, start)
    loader = DataLoader(
        data,
        batch_sampler=(batch[rows] for batch in order),
        num_workers=recipe.data.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=recipe.data.workers > 0,
        prefetch_factor=PREFETCH if recipe.data.workers else None,
        worker_init_fn=ignore_signals,
    )
    loading: Any = iter(loader)
    watch = LoaderWatch(settings.loader_timeout, accelerator)
    try:
        with print_rank_errors():
            for step in itertools.count(start + 1):
                with watch.waiting_for(step):
                    batch = next(loading)
                if not recipe.alignments and ("x" in batch or "moments" in batch):
                    batch.pop("image", None)  # neither an encoder nor the autoencoder needs it
                yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
    finally:
        watch.close()
        if recipe.data.workers:
            # Python alone would hang at exit: it sends SIGTERM to workers that an error's traceback keeps alive.
            loading._shutdown_workers()
            for process in loading._workers:
                process.kill()  # a stalled one does not stop by itself


class LoaderWatch:
    """Warns of a stalled loader: after `timeout` seconds without a batch, again after twice as long, and so on."""

    def __init__(self, timeout: float, accelerator: Accelerator):
        self.timeout, self.process = timeout, accelerator.process_index
        self.step, self.since, self.patience = 0, math.inf, timeout  # inf: not waiting
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="loader watch", daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def waiting_for(self, step: int) -> Iterator[None]:
        self.step, self.patience, self.since = step, self.timeout, time.monotonic()
        try:
            yield
        finally:
            self.since = math.inf

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.closed.wait(min(1.0, self.timeout / 4)):
            waited = time.monotonic() - self.since
            if waited > self.patience:
                self.patience *= 2
                warn(
                    f"process {self.process} has waited {waited:.0f} s for the batch of step {self.step}: the loader "
                    "is stalled (a slow or dead disk or network? see data.workers)"
                )
