"""How far the device is from its limit, and which kind of operation is to blame: `--roofline`.

Counted is what eager execution asks for, operation by operation: arithmetic (a multiply-add is two) and bytes, each
tensor that an operation takes read once, and each that it gives written once. An operation can take no less than

    max(arithmetic / the best product or 3x3 convolution measured here, bytes / the copy measured here),

and their sum is the `limit` of eager execution. The `ideal` is the same sum over convolutions, products and attention
alone: everything else is fused into them, so only their inputs, weights and outputs pass through memory. Caches may
beat the limit: a tensor that is still in one is not read from memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dic_repa.bench.device import quiet
from dic_repa.bench.peaks import measure_bandwidth

CONVOLUTION, PRODUCTS, ATTENTION = "convolutions", "matrix products", "attention"
CONDITIONING, ELEMENTWISE, FUSED = "conditioning", "modulation, gates, sums", "fused kernels and the rest"
KINDS = {  # names of torch's operations, with or without _backward
    "norms": {
        "native_group_norm",
        "native_layer_norm",
        "native_batch_norm",
        "_fused_rms_norm",
        "cudnn_batch_norm",
        "norm_gelu",
    },
    "GELU and SiLU": {"gelu", "silu", "relu", "sigmoid", "tanh"},
    "concatenation": {"cat"},
    "resampling and copies": {"pixel_unshuffle", "pixel_shuffle", "clone", "copy_", "_to_copy", "zero_", "fill_"},
    PRODUCTS: {"mm", "addmm"},
    ATTENTION: {"bmm", "baddbmm", "_softmax", "_safe_softmax", "_softmax_backward_data"},
    CONDITIONING: {"embedding", "embedding_dense"},
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
OPERATIONS = ("aten::", "dic_repa::")  # the latter are those of `models/kernels.py`
OVERWRITING = {"copy_", "zero_", "fill_"}  # they do not read what they write
Shape = Sequence[int]
COLUMNS = {  # key of a row: heading and format
    "kind": ("kind", "{}"),
    "calls": ("calls", "{}"),
    "gflop": ("GFLOP", "{:.4g}"),
    "gb": ("GB", "{:.3g}"),
    "limit_ms": ("limit, ms", "{:.4g}"),
    "measured_ms": ("measured, ms", "{:.4g}"),
    "share": ("of limit", "{:.0%}"),
}


@dataclass(frozen=True)
class Operation:
    """One call of a torch operation: its kind, arithmetic, and bytes."""

    kind: str
    operations: float
    read: int
    written: int

    def seconds(self, peak: Mapping[str, float], bandwidth: float) -> float:
        """The least time that it takes, of TFLOP/s (`measure_peak`) and GB/s (`measure_bandwidth`)."""
        most = peak["convolution" if self.kind.endswith(CONVOLUTION) else "matrix"]
        return max(self.operations / most / 1e12, (self.read + self.written) / bandwidth / 1e9)


class Recorder(TorchDispatchMode):
    """While entered, notes each `Operation`, on any device, meta too; views take nothing. `batch` is how many images
    there are: what has a row for each of them, and no positions, is conditioning."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # in inference mode, what is made of other operations arrives whole
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        given, made = _tensors((args, kwargs)), _tensors(out)
        if func._schema.is_mutable:
            made = _tensors([value for value, told in zip(args, func._schema.arguments) if _changed(told)])
            given = [tensor for tensor in given if name not in OVERWRITING or not any(tensor is m for m in made)]
        elif not made or name.startswith(("empty", "new_empty")) or _is_view(made[0], given):
            return out
        read = sum(map(_bytes, given))
        if name == "embedding":  # only the rows that are looked up
            read = _bytes(made[0]) + _bytes(given[1])
        shapes = [tuple(tensor.shape) for tensor in given]
        kind = kind_of(name, shapes, self.batch)
        self.found.append(Operation(kind, _arithmetic(func, name, args, kwargs, out), read, sum(map(_bytes, made))))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _changed(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(made: Tensor, given: Sequence[Tensor]) -> bool:
    return any(made.untyped_storage()._cdata == tensor.untyped_storage()._cdata for tensor in given)


def _bytes(tensor: Tensor) -> int:
    """What lies in memory: an expanded dimension is there once."""
    return tensor.element_size() * math.prod(n for n, step in zip(tensor.shape, tensor.stride()) if step or n == 0)


def _arithmetic(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> float:
    if (count := flop_registry.get(func.overloadpacket)) is not None:
        return count(*args, **(kwargs or {}), out_val=out)
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):  # which torch's table does not have
        backward = name.endswith("_backward")
        query, key = args[1:3] if backward else args[:2]  # (B, heads, positions, width); forwards two products
        return (10 if backward else 4) * query.numel() * key.shape[-2]
    return 0


def kind_of(name: str, shapes: Sequence[Shape], batch: int) -> str:
    """The kind of torch's operation `name` on tensors of these shapes."""
    found = _known(name)
    if found == CONVOLUTION:
        weight = shapes[2 if name.endswith("_backward") else 1]
        return f"{'x'.join(map(str, weight[2:]))} {CONVOLUTION}"
    if found in (None, ELEMENTWISE, PRODUCTS, "GELU and SiLU", "resampling and copies") and _no_positions(
        found, shapes, batch
    ):
        return CONDITIONING
    return found or ELEMENTWISE


def _known(name: str) -> str | None:
    if name.startswith(("_foreach_", "_fused_adam", "_fused_sgd")):
        return "optimizer and average"
    if "attention" in name:
        return ATTENTION
    bare = name.removesuffix("_backward")
    return CONVOLUTION if bare == "convolution" else KIND_OF.get(name, KIND_OF.get(bare))


def _no_positions(kind: str | None, shapes: Sequence[Shape], batch: int) -> bool:
    """Whether there is a row for each image at most: (B, width), (B, width, 1, 1), or a product with such a factor."""
    bare = [tuple(shape[: 1 + max((k for k, n in enumerate(shape) if n > 1), default=-1)]) for shape in shapes]
    if kind == PRODUCTS:
        return min(bare[-1][:1] + bare[-2]) <= batch if len(bare) > 1 and bare[-2] else True
    rows = [shape[0] for shape in bare if len(shape) == 2]
    return (bool(rows) and max(map(len, bare)) <= 2 and max(rows) <= batch) or not any(bare)


def record(call: Callable[[], object], batch: int) -> list[Operation]:
    """What a call asks for, if nothing of it is compiled; it runs once."""
    with torch.compiler.set_stance("force_eager"), Recorder(batch) as recorder:
        call()
    return recorder.found


def measured_by_kind(call: Callable[[], object], device: torch.device, batch: int) -> dict[str, float]:
    """Seconds of a call by kind: of a GPU's kernels, or a CPU's in operations.

    What a compiler fused, and what belongs to no operation, is `FUSED`.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with quiet(), profile(activities=activities, record_shapes=True) as recorded:
        call()
        if gpu:
            torch.cuda.synchronize(device)
    found: dict[str, float] = {}
    events = list(recorded.events())
    for event in (event for event in events if event.device_type == DeviceType.CPU):
        spent = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6
        if spent:
            kind = _kind_of_event(event, batch)
            found[kind] = found.get(kind, 0.0) + spent
    if gpu:  # kernels that no operation launched, such as a compiler's
        kernels = [
            e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
        ]
        rest = sum(event.self_device_time_total for event in kernels) / 1e6 - sum(found.values())
        found[FUSED] = found.get(FUSED, 0.0) + max(0.0, rest)
    return found


def _kind_of_event(event: Any, batch: int) -> str:
    """By the outermost operation around it that has a kind: a convolution's own helpers belong to it."""
    around = list(_ancestors(event))
    named = [e for e in around if e.name.startswith(OPERATIONS)]
    known = [e for e in named if _known(_bare(e))]
    if not named:
        return FUSED
    chosen = known[-1] if known else named[0]
    return kind_of(_bare(chosen), [shape for shape in chosen.input_shapes or () if shape], batch)


def _bare(event: Any) -> str:
    return event.name.partition("::")[2]


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def compare(
    found: Sequence[Operation], measured: Mapping[str, float], peak: Mapping[str, float], bandwidth: float
) -> dict[str, Any]:
    """Beside each other, what was asked for and the seconds by kind.

    Returns:
        `rows`, one for each kind, the one that loses most milliseconds first; `limit_ms`, `ideal_ms` and
        `measured_ms` of all; and in `words` what is to blame.
    """
    rows = []
    for kind in dict.fromkeys([*(each.kind for each in found), *measured]):
        mine = [each for each in found if each.kind == kind]
        row: dict[str, Any] = {"kind": kind, "calls": len(mine), "gflop": sum(each.operations for each in mine) / 1e9}
        row |= {"gb": sum(each.read + each.written for each in mine) / 1e9}
        row |= {"limit_ms": 1e3 * sum(each.seconds(peak, bandwidth) for each in mine)}
        row |= {"measured_ms": 1e3 * measured.get(kind, 0.0)}
        if row["measured_ms"] and mine:
            row["share"] = row["limit_ms"] / row["measured_ms"]
        rows.append(row)
    rows.sort(key=lambda row: row["limit_ms"] - row["measured_ms"])
    work = [each for each in found if each.kind.endswith((CONVOLUTION, PRODUCTS, ATTENTION))]
    total = {key: sum(row[key] for row in rows) for key in ("limit_ms", "measured_ms")}
    total["ideal_ms"] = 1e3 * sum(each.seconds(peak, bandwidth) for each in work)
    worst = rows[0]
    lost = worst["measured_ms"] - worst["limit_ms"]
    words = (
        f"limit {total['limit_ms']:.4g} ms eager, {total['ideal_ms']:.4g} with all else fused into convolutions and "
        f"products; measured {total['measured_ms']:.4g}. Farthest from its limit: {worst['kind']}, {lost:.4g} ms lost"
    )
    return {"rows": rows, **total, "words": words}


def rooflines(
    cases: Sequence[Any], device: torch.device, peaks: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """`compare` of each bench case by its label and batch: what it asks for, run eagerly, and the time by kind of one
    call as it is. Not of CUDA graphs, whose kernels belong to no operation."""
    bandwidth, found = measure_bandwidth(device), {}
    for case in cases:
        if not case.graphs:
            asked = record(case, case.batch)
            case()  # as it is again, before the one that is profiled
            spent = measured_by_kind(case, device, case.batch)
            found[f"{case.label}, batch {case.batch}"] = compare(asked, spent, peaks[case.precision], bandwidth)
    return found
