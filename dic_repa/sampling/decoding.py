"""Decoding samples while the next ones are being made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def decode_batches(samples: Iterable[Tensor], decode: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The images of each batch of `samples`, on the CPU, in order.

    On a GPU a batch is decoded and copied on a second stream, and handed out when the next batch is on its way, so that
    neither decoding nor whoever saves the images keeps the sampler waiting.
    """
    stream, pending = None, None
    for x in samples:
        if not x.is_cuda:
            yield decode(x)
            continue
        stream = stream or torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            x.record_stream(stream)
            images = decode(x).to("cpu", non_blocking=True)
            done = stream.record_event()
        if pending:
            yield _finished(*pending)
        pending = images, done
    if pending:
        yield _finished(*pending)


def _finished(images: Tensor, done: torch.cuda.Event) -> Tensor:
    done.synchronize()
    return images
