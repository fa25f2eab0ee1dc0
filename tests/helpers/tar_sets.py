"""Sets in WebDataset's format, written by Python's tarfile, and a web server of them that can fail."""

from __future__ import annotations

import contextlib
import io
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from pictures import as_file, picture

Samples = dict[str, dict[str, bytes]]  # the files of each sample by their endings


def make_samples(count: int, first: int = 0, size: int = 16, labels: bool = True, channels: int = 0) -> Samples:
    """Samples whose class is their own number; with `channels`, an array of so many, half as high and wide."""
    samples = {}
    for k in range(first, first + count):
        files = {"png": as_file(picture(k, (size, size)))}
        if labels:
            files["cls"] = str(k).encode()
        if channels:
            file = io.BytesIO()
            np.save(file, np.random.default_rng(k).standard_normal((channels, size // 2, size // 2)).astype("f2"))
            files["npy"] = file.getvalue()
        samples[f"{k:05d}"] = files
    return samples


def write_tar(path: Path, samples: Samples) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def write_set(folder: Path, *counts: int, **options) -> Path:
    """Shards 00.tar, 01.tar, ... of so many samples each, which are numbered through all of them."""
    for k, count in enumerate(counts):
        write_tar(folder / f"{k:02d}.tar", make_samples(count, sum(counts[:k]), **options))
    return folder


@dataclass
class Server:
    """`faults` by name, for the first so many requests: 'cut' ends an answer in its middle, 'silent' gives none, a
    number is the answer's status. `asked` counts the requests that were answered whole, by name."""

    address: str
    faults: dict[str, list] = field(default_factory=dict)
    asked: Counter = field(default_factory=Counter)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/")
            fault = server.faults[name].pop(0) if server.faults.get(name) else None
            if fault == "silent":
                time.sleep(0.5)
                return
            file = folder / name
            if isinstance(fault, int) or not file.is_file():
                self.send_error(fault or 404)
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
            server.asked[name] += fault is None

        def log_message(self, *_) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{running.server_port}")
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
