"""A script's `main(FOLDER)` in processes that join as torchrun's do: `python forked.py COUNT SCRIPT FOLDER`.

They are forks of this one, which has imported everything already: that takes each process seconds. As under torchrun,
where one fails the others are told to end; how it ended is printed.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

PATIENCE = 30  # seconds that the others have to end


def main(count: int, script: Path, folder: Path) -> int:
    for module in ("dic_repa.training.loop", "torch.distributed.fsdp", "peft"):  # what each would import
        importlib.import_module(module)

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    running = [begin(script, folder, {**place, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(count)]
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(process, signal.SIGKILL) for process in running])
    failed = 0
    while running:
        process, status = os.wait()
        running.remove(process)
        if status and not failed:
            failed = 1
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an error"
            print(f"process {process} has ended by {how}", file=sys.stderr)
            for other in running:
                os.kill(other, signal.SIGTERM)
            signal.alarm(PATIENCE)
    return failed


def begin(script: Path, folder: Path, place: dict[str, object]) -> int:
    """The id of a fork that runs the script as the process that `place` says."""

    def work() -> None:
        os.environ.update({name: str(value) for name, value in place.items()})
        importlib.import_module(script.stem).main(folder)

    return fork(work)


def fork(work: Callable[[], object]) -> int:
    """The id of a fork that does `work`, and ends with 1 after an error."""
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
