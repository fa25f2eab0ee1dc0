"""The batches of a run, and the randomness of its steps.

A step has a global batch; each process has a share of it, and goes through its share in one or several passes.

All randomness comes from (seed, step), drawn for the global batch and then sliced. So nothing random is saved in a
checkpoint, a resumed run equals an uninterrupted one, and the number of processes changes nothing.
"""

import contextlib
import functools
import hashlib
import itertools
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from dic_repa.errors import UserError
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.runtime.progress import warn
from dic_repa.runtime.watchdog import SUSPENDED
from dic_repa.training.preemption import Preempted, ignore_signals

PREFETCH = 4  # batches that each loader process has ready: they bridge a slow read from a disk or a network
LOOK = 0.25  # seconds between two looks at signals and loader processes while a batch is waited for
CLOSING = 2.0  # seconds that loader processes have to end by themselves

Permutation = Callable[[torch.Generator], np.ndarray]  # a data set's order of an epoch, (len(data),)


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator from which `step` draws times, noise, dropped labels and the posterior's noise, in this order."""
    return torch.Generator(device).manual_seed(_stream(seed, "step") + step)


def data_order(
    seed: int, count: int, batch_size: int, start_step: int = 0, permutation: Permutation | None = None
) -> Iterator[list[int]]:
    """Endless global batches of indices into a data set of `count` samples, from the batch of `start_step` on.

    The data is one stream of epochs, each with its own permutation; a batch may span two, so no epoch is cut short.
    `permutation` is that of a data set that has one, which draws an epoch's order from a generator.
    """

    @functools.lru_cache(maxsize=2)  # a batch spans at most two epochs, unless it is larger than the data
    def epoch_order(epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(_stream(seed, "data") + epoch)
        order = permutation(generator) if permutation else torch.randperm(count, generator=generator).numpy()
        if len(order) != count:
            raise UserError(f"the data's permutation has {len(order)} places for {count} samples; correct its method")
        return order

    position = start_step * batch_size
    while True:
        yield [int(epoch_order(p // count)[p % count]) for p in range(position, position + batch_size)]
        position += batch_size


def order_of(data: Any, settings: TrainSection, start_step: int) -> Iterator[list[int]]:
    """`data_order` of a data set; of a stream, places in it."""
    if hasattr(data, "stream"):
        places = itertools.count(start_step * settings.batch_size)
        return iter(lambda: list(itertools.islice(places, settings.batch_size)), [])
    permutation = getattr(data, "permutation", None)
    return data_order(settings.seed, len(data), settings.batch_size, start_step, permutation)


class _StreamedBatches(IterableDataset):
    """The `rows` of each global batch of a stream, from the batch of step `start` on.

    Of several loader processes, from which the loader takes batches in turn, each reads all and decodes its own.
    """

    def __init__(self, data: Any, settings: TrainSection, start: int, rows: slice):
        self.data, self.settings, self.start, self.rows = data, settings, start, rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size, loader = self.settings.batch_size, get_worker_info()
        own, processes = (loader.id, loader.num_workers) if loader else (0, 1)
        stream = self.data.stream(_stream(self.settings.seed, "data"), self.start * size)
        for number in itertools.count():
            batch = list(itertools.islice(stream, size))
            if number % processes == own:
                yield default_collate([self.data.decode(row) for row in batch[self.rows]])


def process_rows(batch_size: int, process: int, processes: int) -> slice:
    """The rows of the global batch that belong to `process`."""
    share = batch_size // processes
    return slice(process * share, (process + 1) * share)


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


class Batches:
    """This process's rows of the global batches from step `start` on, on the device, one by one; closed at the end.

    A thread takes them from the loader, so that the main thread can stop waiting: in `next`, Preempted is raised after
    a signal, where a loader process has died, and after `timeouts.data`.
    """

    def __init__(self, data, recipe: Recipe, accelerator: Accelerator, start: int, signals: Sequence[int] = ()):
        settings, self.recipe, self.device, self.signals = recipe.train, recipe, accelerator.device, signals
        self.process, self.step = accelerator.process_index, start
        rows = process_rows(settings.batch_size, accelerator.process_index, accelerator.num_processes)
        streamed = {"dataset": _StreamedBatches(data, settings, start, rows), "batch_size": None}
        order = order_of(data, settings, start)
        indexed = {"dataset": data, "batch_sampler": (batch[rows] for batch in order)}
        loader: DataLoader = DataLoader(
            **(streamed if hasattr(data, "stream") else indexed),
            num_workers=recipe.data.workers,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=recipe.data.workers > 0,
            prefetch_factor=PREFETCH if recipe.data.workers else None,
            worker_init_fn=ignore_signals,
        )
        self.loading: Any = iter(loader)
        self.workers = getattr(self.loading, "_workers", [])
        self.dead_child = _leave_dead_children()
        self.wanted: SimpleQueue[bool] = SimpleQueue()
        self.answers: SimpleQueue[tuple[dict | None, BaseException | None]] = SimpleQueue()
        self.thread = threading.Thread(target=self._fetch, name="loader", daemon=True)
        self.thread.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Tensor]:
        self.step += 1
        self.wanted.put(True)
        batch, error = self._wait()
        if error is not None:
            raise _in_a_line(error)
        assert batch is not None
        if not any(each.encoder for each in self.recipe.alignments) and ("x" in batch or "moments" in batch):
            batch.pop("image", None)  # neither an encoder nor the autoencoder needs it
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _fetch(self) -> None:
        if self.device.type == "cuda" and self.device.index is not None:  # a single process has "cuda" alone
            torch.cuda.set_device(self.device)  # each thread has its own
        while self.wanted.get():
            try:
                self.answers.put((next(self.loading), None))
            except BaseException as error:
                self.answers.put((None, error))

    def _wait(self) -> tuple[dict | None, BaseException | None]:
        patience, longest = self.recipe.train.loader_timeout, self.recipe.timeouts.data
        waited, last = 0.0, time.monotonic()
        while True:
            if self.signals:
                raise Preempted
            with contextlib.suppress(queue.Empty):
                batch, error = self.answers.get(timeout=LOOK)
                if error is None or not self._dead():
                    return batch, error
            now, batch_of = time.monotonic(), f"the batch of step {self.step}"
            waited, last = waited + min(now - last, SUSPENDED), now
            if dead := self._dead():
                raise Preempted(f"process {self.process} has lost a loader process, {dead}, and with it {batch_of}")
            if longest and waited > longest:
                stalled = f"has waited {waited:.0f} s for {batch_of}, longer than timeouts.data"
                raise Preempted(f"process {self.process} {stalled} (a slow or dead disk or network?)")
            if waited > patience:
                patience *= 2
                warn(
                    f"process {self.process} has waited {waited:.0f} s for {batch_of}: the loader is stalled (a slow "
                    "or dead disk or network? see data.workers)"
                )

    def _dead(self) -> str:
        """How a loader process has ended; "" if none has."""
        code = next((worker.exitcode for worker in self.workers if worker.exitcode is not None), None)
        if code is None:
            return ""
        if code >= 0:
            return f"which ended with code {code}"
        hints = {"SIGKILL": " (no memory left? lower data.workers)", "SIGBUS": " (/dev/shm full? lower data.workers)"}
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}{hints.get(name, '')}"

    def close(self) -> None:
        """End the loader and its processes, those that hang by force."""
        self.wanted.put(False)
        if not self.workers:
            return  # what a thread reads cannot be ended; it ends with this process
        self.thread.join(LOOK)
        force = threading.Timer(CLOSING, lambda: [worker.kill() for worker in self.workers])
        force.start()
        try:
            # Python alone would hang at exit: it sends SIGTERM to workers that an error's traceback keeps alive.
            self.loading._shutdown_workers()
        finally:
            force.cancel()
            for worker in self.workers:
                worker.kill()
            if callable(self.dead_child):
                signal.signal(signal.SIGCHLD, self.dead_child)


def _leave_dead_children() -> Any:
    """Take away torch's handler, which raises in the middle of a step when a loader process dies; it is returned."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return None


def _in_a_line(error: BaseException) -> BaseException:
    """The error of a data set; where it was raised in a loader process, without that process's traceback."""
    if isinstance(error, OSError) and "Original Traceback" in str(error):
        return UserError(f"the data cannot be read ({str(error).strip().splitlines()[-1]})")
    return error
