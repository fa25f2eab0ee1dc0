"""How several processes write one checkpoint: each its own rows, then, with all on the disk, the main one the rest."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import flush
from dic_repa.files.hashing import file_sha256
from dic_repa.files.outputs import ASIDE, list_output
from dic_repa.files.shards import Rows, Stored, open_tensors, save_rows, shard_path
from dic_repa.files.weights import WRITE_ERRORS


class Shards(NamedTuple):
    """What all processes have written: sets of tensors in `folder`, to be opened as NAME.safetensors."""

    folder: Path
    sha256: dict[str, str]  # of the files in it

    def open(self, name: str) -> contextlib.AbstractContextManager[dict[str, Stored]]:
        return open_tensors(self.folder / f"{name}.safetensors")


class ShardWriter:
    """Made and closed by all processes together, and `write` called by each of them, in a thread of its own.

    They wait for each other by gloo, also on GPUs, where NCCL's calls are the training's.
    """

    def __init__(self, checkpoints: Path, accelerator: Accelerator, patience: timedelta = timedelta(hours=3)):
        self.folder = checkpoints / f"{ASIDE}shards"
        self.main, self.process = accelerator.is_main_process, accelerator.process_index
        self.count = accelerator.num_processes
        if self.main:
            list_output(checkpoints / "shards")  # so that the next one removes what a kill leaves
        self.group: Any = torch.distributed.new_group(backend="gloo", timeout=patience)

    @contextlib.contextmanager
    def write(self, name: str, sets: Mapping[str, Mapping[str, Tensor | Rows | None]]) -> Iterator[Shards]:
        """Write this process's part of each set, and enter when all have. On leaving, the main one removes them.

        A UserError in all processes if one of them fails.
        """
        folder = self.folder / name
        try:
            outcomes: list = [None] * self.count
            torch.distributed.all_gather_object(outcomes, self._write_mine(folder, sets), group=self.group)
            for process, outcome in enumerate(outcomes):
                if isinstance(outcome, str):
                    raise UserError(f"process {process}: {outcome}")
            yield Shards(folder, {file: digest for outcome in outcomes for file, digest in outcome.items()})
        finally:
            if self.main:
                shutil.rmtree(folder, ignore_errors=True)

    def _write_mine(self, folder: Path, sets: Mapping[str, Mapping[str, Tensor | Rows | None]]) -> dict[str, str] | str:
        """The SHA-256 of each file; or why they cannot be written."""
        digests = {}
        try:
            folder.parent.mkdir(exist_ok=True)  # not the folder above: a machine may not share the run's
            folder.mkdir(exist_ok=True)
            for name, tensors in sets.items():
                file = shard_path(folder / f"{name}.safetensors", self.process, self.count)
                save_rows(tensors, file)
                flush(file)
                digests[file.name] = file_sha256(file)
        except WRITE_ERRORS as error:
            return first_line(error)
        return digests

    def close(self) -> None:
        if self.main:
            shutil.rmtree(self.folder, ignore_errors=True)
        torch.distributed.destroy_process_group(self.group)
