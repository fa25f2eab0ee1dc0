"""How a GPU computes in float32, and by which algorithms: torch's switches for the whole process, in one place.

TF32 rounds the factors of float32 products to 10 bits of mantissa. cuDNN's benchmark mode tries all algorithms of a
convolution at its first call in each shape, and takes the fastest from then on.
"""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def gpu_arithmetic(tf32: bool, convolutions: bool | None = None, benchmark: bool = False) -> Iterator[None]:
    """Inside, a GPU computes in this way; afterwards everything is as it was. Also a decorator.

    Args:
        tf32: whether matrix products may use it.
        convolutions: whether these may; None: alike. Torch itself allows it there alone.
        benchmark: cuDNN's benchmark mode, for work whose shapes are few. It stays off where the user has asked torch
            for deterministic algorithms, since its choice may differ from run to run.
    """
    matrices, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    matrices.allow_tf32 = tf32
    cudnn.allow_tf32 = tf32 if convolutions is None else convolutions
    cudnn.benchmark = benchmark and not deterministic
    try:
        yield
    finally:
        matrices.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
