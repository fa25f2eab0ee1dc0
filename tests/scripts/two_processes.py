"""What two processes do that one cannot show: `torchrun --nproc_per_node 2 tests/scripts/two_processes.py FOLDER`.

Writes `buckets.txt` (how DDP exchanges gradients) and the runs `ddp` (20 steps of two passes), `ddp-10` (10 of them),
`sharded` (20 under FSDP2; `layouts.txt` counts its convolutions' calls, and those of another layout than their
weights), `sharded-sgd`, `NAME-none` and `NAME-fsdp2` of the methods of `methods.py` and of `frozen` and `lora` (which
begin with the weights of `ddp-10`), `NAME-ddp` of the denoisers of `denoisers.py`, `poisoned` (one process alone meets
values that are not finite) and `stopped` (one process alone is told to stop); `absent-0.txt` and `absent-1.txt` tell
what each says where one alone has no data, `damaged-0.txt` and `damaged-1.txt` where one alone meets a damaged sample,
`full-0.txt` and `full-1.txt` where one alone has a full disk, and `prints-0.txt` and `prints-1.txt` which of them
prints an error. First comes a step of somebody else's loop, with an `Aligner`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import torch
from accelerate import Accelerator
from aligner_steps import BATCH, gradients
from denoisers import DENOISERS, denoiser_run
from methods import METHODS, UNSHARDED, method_run
from safetensors.torch import save_file
from small_runs import ALIGNED, PoisonedDigits, small_run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

import dic_repa.training.shard_writer as shard_writer
from dic_repa.errors import UserError, prints_errors
from dic_repa.runtime.processes import start_processes
from dic_repa.training import EMA, Preempted
from dic_repa.training.inputs import data_order

BEGUN = {  # what begins with other weights, of which a part trains
    "frozen": ["train.freeze=['enc.*', 'mid.*']", "train.steps=4"],
    "lora": ["train.lora.rank=3", "train.steps=4", "optimizer.learning_rate=0.01"],
}
LONG = ["train.steps=20", "train.checkpoint_every=10", "train.batch_size=8"]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    somebody_elses_loop(folder)
    ddp = start_processes().prepare(nn.Linear(2, 2))
    (folder / "buckets.txt").write_text(f"{ddp.bucket_bytes_cap} {ddp.gradient_as_bucket_view}")
    small_run(folder / "ddp", *LONG, "train.micro_batch=2", base=ALIGNED)
    small_run(folder / "ddp-10", *LONG, "train.steps=10", base=ALIGNED)
    sharded = [
        "train.sharding=fsdp2",
        "train.sample_every=10",
        "sample.steps=1",
        "sample.precision=bf16",
        "train.power_ema=[0.1]",
    ]
    called = mixed = 0

    def note(module, given):
        nonlocal called, mixed
        if isinstance(module, nn.Conv2d) and not given[0].is_meta:
            called += 1
            layouts = (torch.channels_last, torch.contiguous_format)
            both = (
                [tensor.is_contiguous(memory_format=one) for one in layouts] for tensor in (given[0], module.weight)
            )
            mixed += not any(map(all, zip(*both)))

    with register_module_forward_pre_hook(note):
        small_run(folder / "sharded", *LONG, *sharded, base=ALIGNED)
    if os.environ["RANK"] == "0":
        (folder / "layouts.txt").write_text(f"{called} {mixed}")

    small_run(folder / "sharded-sgd", "optimizer.name=sgd", "train.sharding=fsdp2")
    for sharding in ("none", "fsdp2"):
        for name in METHODS:
            if sharding == "none" or name not in UNSHARDED:
                method_run(folder / f"{name}-{sharding}", name, f"train.sharding={sharding}")
        for name, keys in BEGUN.items():
            given = [*keys, f"train.init_from={folder / 'ddp-10'}", f"train.sharding={sharding}"]
            small_run(folder / f"{name}-{sharding}", *given)

    for name in DENOISERS:
        denoiser_run(folder / f"{name}-ddp", name)

    save = shard_writer.save_rows

    def full(tensors, path):
        if os.environ["RANK"] == "1" and "step_8" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    shard_writer.save_rows = full
    try:
        small_run(folder / "full", "train.sharding=fsdp2")
    except UserError as error:
        (folder / f"full-{os.environ['RANK']}.txt").write_text(str(error))
    shard_writer.save_rows = save

    order = data_order(seed=0, count=8000, batch_size=4)
    third = [next(order) for _ in range(3)][2]
    PoisonedDigits.poisoned = frozenset(third[2:])  # the second process's half of the third batch
    every = ["train.steps=4", "train.checkpoint_every=1", "train.keep_checkpoints=4"]
    small_run(folder / "poisoned", *every, "data.name=poisoned-digits")
    small_run(folder / "poisoned-sharded", *every, "data.name=poisoned-digits", "train.sharding=fsdp2")

    read = PoisonedDigits.__init__

    def absent(self, *arguments, **options):
        if os.environ["RANK"] == "1":
            raise UserError("there is no data folder")
        read(self, *arguments, **options)

    PoisonedDigits.__init__ = absent
    try:
        small_run(folder / "absent", "data.name=poisoned-digits")
    except UserError as error:
        (folder / f"absent-{os.environ['RANK']}.txt").write_text(str(error))

    PoisonedDigits.__init__ = read
    get = PoisonedDigits.__getitem__

    def damaged(self, index):
        if index == third[3]:
            raise UserError("a.png is damaged")
        return get(self, index)

    PoisonedDigits.__getitem__ = damaged
    try:
        small_run(folder / "damaged", "data.name=poisoned-digits")
    except UserError as error:
        (folder / f"damaged-{os.environ['RANK']}.txt").write_text(str(error))
    (folder / f"prints-{os.environ['RANK']}.txt").write_text(str(prints_errors()))

    update = EMA.update

    def signalled(self, denoiser, step=1):
        update(self, denoiser, step)
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    EMA.update = signalled
    try:
        small_run(folder / "stopped")
    except Preempted as reason:
        (folder / f"stopped-{os.environ['RANK']}.txt").write_text(str(reason))


def somebody_elses_loop(folder: Path) -> None:
    """One step with an `Aligner`, under DDP and under FSDP2: `aligner-ddp.safetensors`, `aligner-fsdp2.safetensors`."""
    rank = Accelerator().process_index
    rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)

    def sharded(module):
        return fully_shard(module.to(memory_format=torch.contiguous_format), mesh=init_device_mesh("cpu", (2,)))

    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", sharded)):
        found = gradients(wrap, rows)
        if rank == 0:
            save_file({key: value.contiguous() for key, value in found.items()}, folder / f"aligner-{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
