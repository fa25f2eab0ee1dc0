"""A denoiser as a program: by torch.export, and from there as an ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dic_repa.errors import UserError, first_line
from dic_repa.export.inputs import Inputs
from dic_repa.models.pretrained import Pretrained

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
NAMES = ("x", "t", "y")
MOST_ROWS = 2**16  # of a free batch: without a bound, torch 2.6 finds that its indices might overflow


class _Float32(nn.Module):
    """The denoiser, in whatever dtype, behind float32: x and t, and the prediction. So a caller needs no half
    precision, and t keeps its digits."""

    def __init__(self, denoiser: Pretrained):
        super().__init__()
        self.denoiser, self.dtype = denoiser, next(denoiser.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser(x.to(self.dtype), t, y).float()


class _WithoutAddcmul(TorchFunctionMode):
    """addcmul as sum and product, which is what ONNX has: torch 2.6 fails to take it apart where the batch is free."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.addcmul and not kwargs:
            x, a, b = args
            return x + a * b
        return func(*args, **(kwargs or {}))


def write_torch(folder: Path, denoiser: Pretrained, example: Inputs, dynamic: bool) -> tuple[str, Run]:
    """denoiser.pt2, opened by `torch.export.load(file).module()`: its name, and the program as the file has it."""
    file = folder / "denoiser.pt2"
    program = _trace(denoiser, example, dynamic)
    buffer = io.BytesIO()  # at the error of a full disk, torch's own writer would end the process
    with _quiet():
        torch.export.save(program, buffer)
    file.write_bytes(buffer.getbuffer())
    return file.name, torch.export.load(file).module()


def write_onnx(folder: Path, denoiser: Pretrained, example: Inputs, dynamic: bool) -> tuple[str, Run]:
    """denoiser.onnx (with denoiser.onnx.data beside it above 2 GB): its name, and the file as onnxruntime runs it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"the format onnx needs {package}, which is not installed: pip install 'dic-repa[export]'")
    with _WithoutAddcmul():
        program = _trace(denoiser, example, dynamic)
    shapes = [{0: "batch"}] * len(NAMES) if dynamic else None
    options: dict[str, Any] = {"input_names": NAMES, "output_names": ["prediction"], "dynamic_shapes": shapes}
    file = folder / "denoiser.onnx"
    with _quiet():
        try:
            converted = torch.onnx.export(program, example, dynamo=True, optimize=True, verbose=False, **options)
        except Exception as error:  # of any kind, many lines long
            raise UserError(f"{type(denoiser).__name__} cannot be written as ONNX: {_cause(error)}") from error
        assert converted is not None
        converted.save(file)
    return file.name, _open_onnx(file)


def _open_onnx(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} does not open the ONNX file, so it is not kept: {_cause(error)}"
        ) from error

    def run(*inputs: Tensor) -> Tensor:
        (prediction,) = session.run(None, {name: value.numpy() for name, value in zip(NAMES, inputs)})
        return torch.from_numpy(prediction)

    return run


def _trace(denoiser: Pretrained, example: Inputs, dynamic: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", max=MOST_ROWS)
    shapes = tuple({0: batch} for _ in NAMES) if dynamic else None
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(_Float32(denoiser), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # what tracing raises is of any kind, and many lines long
        advice = "; a fixed --batch may work where a free one does not" if dynamic else ""
        raise UserError(
            f"{type(denoiser).__name__} cannot be exported: torch.export stops at {_cause(error)}{advice}"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # else the file would hold paths and code of this machine
    return program


def _cause(error: BaseException) -> str:
    """The first line of the error that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries say of their own insides."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
