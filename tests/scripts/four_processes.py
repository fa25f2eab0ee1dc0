"""Sharded checkpoints in four processes: `torchrun --nproc_per_node 4 tests/scripts/four_processes.py FOLDER`.

Continues `one-then-four`, which one process began, and writes to `loaded.txt` how many of the tensors that the four
loaded are those of its checkpoint, and of how many. Then continues `killed`, which two sharded processes began, until
the last process is killed while the checkpoint of step 20 is written.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import torch
from safetensors.torch import load_file
from small_runs import ALIGNED, small_run
from two_processes import LONG

import dic_repa.training.loop as loop
import dic_repa.training.shard_writer as shard_writer

LAST = os.environ["RANK"] == "3"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    load = loop.load_checkpoint

    def load_and_look(checkpoint, accelerator, parts):
        step = load(checkpoint, accelerator, parts)
        model = accelerator.unwrap_model(parts.model).state_dict()
        ema = parts.ema.model.state_dict()
        saved = load_file(checkpoint / "model.safetensors")
        saved |= {f"ema {name}": tensor for name, tensor in load_file(checkpoint / "ema/model.safetensors").items()}
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        saved |= {f"{i}.{name}": tensor for i, values in state.items() for name, tensor in values.items()}
        found = model | {f"ema {name}": tensor for name, tensor in ema.items()}
        state = parts.optimizer.state_dict()["state"]
        found |= {f"{i}.{name}": tensor for i, values in state.items() for name, tensor in values.items()}
        whole = {name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() for name, tensor in found.items()}
        assert whole.keys() == saved.keys()
        same = sum(tensor.equal(saved[name]) for name, tensor in whole.items())
        if LAST:
            (folder / "loaded.txt").write_text(f"{same} {len(saved)}")
        return step

    sharded = [*LONG, "train.sharding=fsdp2"]
    loop.load_checkpoint = load_and_look
    small_run(folder / "one-then-four", *sharded, base=ALIGNED, resume=True)
    loop.load_checkpoint = load

    save = shard_writer.save_rows

    def save_and_die(tensors, path):
        save(tensors, path)
        if LAST and path.name.startswith("model"):
            os.kill(os.getpid(), signal.SIGKILL)

    shard_writer.save_rows = save_and_die
    small_run(folder / "killed", *sharded, "train.power_ema=[0.1]", base=ALIGNED, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
