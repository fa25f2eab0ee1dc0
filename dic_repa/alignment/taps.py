"""Taps: what named submodules of a model gave in its last forward pass, kept by forward hooks.

A pass begins and ends with the model's own call. So a block that gradient checkpointing runs again in the backward pass
is not counted twice, and a pass that nobody asked about is forgotten by the next one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dic_repa.errors import UserError, unknown_name
from dic_repa.models.pretrained import Pretrained, forward_on_meta

Example = Tensor | Sequence[Any] | Mapping[str, Any]  # what a model is called with


class Taps:
    """The outputs of the submodules `names` of `model`, from its forward passes on; `take` gives them, once."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.model = model
        self.modules = {name: find_tap(model, name) for name in names}
        self._outputs: dict[str, list[Any]] | None = None  # of the pass that is running or was the last
        self._running = False
        self._removed = False  # torch compiles no question whether `_handles` is empty
        self._size: tuple[int, int] | None = None
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
            *(module.register_forward_hook(self._keep) for module in set(self.modules.values())),
        ]

    # A copy of the model has the hooks too, such as one that averages weights: only the model itself is listened to.
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is self.model:
            self._outputs, self._running = {name: [] for name in self.modules}, True
            self._size = data_size((*args, *kwargs.values()))

    def _end(self, module: nn.Module, _args: tuple, _output: Any) -> None:
        if module is self.model:
            self._running = False

    def _keep(self, module: nn.Module, _args: tuple, output: Any) -> None:
        if self._running and self._outputs is not None:
            for name, tapped in self.modules.items():
                if module is tapped:
                    self._outputs[name].append(output)

    def take(self) -> dict[str, Any]:
        """What each tap gave in the last forward pass, which is then forgotten.

        Raises:
            UserError: there was no pass, or a tap did not run once in it.
        """
        if self._removed:
            raise UserError("this aligner was removed from its model; make a new one")
        if self._outputs is None:
            raise UserError(
                "the model has not run since the aligner was used: call the model first, then the aligner, once each; "
                "if the model is compiled, make the aligner before the model's first call"
            )
        outputs, self._outputs = self._outputs, None  # they would live on until the next step
        for name, given in outputs.items():
            if len(given) != 1:
                what = f"ran {len(given)} times" if given else "did not run"
                raise UserError(
                    f"tap '{name}' {what} in the model's forward pass, but must run once; suggest_taps names modules "
                    "that do"
                )
        return {name: given for name, (given,) in outputs.items()}

    def feature_map(self, output: Any, name: str) -> Tensor:
        """What the tap of that name gave, as a feature map (B, C, h, w), see `feature_map`."""
        return feature_map(self.model, output, self._size, name)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._outputs, self._removed = [], None, True

    def __deepcopy__(self, memo: dict) -> "Taps":
        return self  # a copy of the model keeps nothing

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_outputs": None, "_handles": []}  # no activations in a pickled model


def find_tap(model: nn.Module, tap: str) -> nn.Module:
    """The submodule of that name; a UserError with the near names if there is none."""
    modules = dict(model.named_modules())
    if not tap or tap not in modules:
        raise unknown_name("tap", tap, [name for name in modules if name])
    return modules[tap]


def data_size(inputs: Iterable[Any]) -> tuple[int, int] | None:
    """(H, W) of the first input that is (B, C, H, W); None without one."""
    for x in inputs:  # torch 2.6 compiles no `next` with a default
        if isinstance(x, Tensor) and x.ndim == 4:
            return x.shape[-2], x.shape[-1]
    return None


def feature_map(model: nn.Module, output: Any, size: tuple[int, int] | None, name: str = "") -> Tensor:
    """A tap's output as a feature map (B, C, h, w), for data of `size` (H, W).

    Of a tuple or dataclass, the first tensor that is a map or tokens counts. Tokens (B, N, C) are laid out by the
    model's own `feature_map(tokens, size)`, or else row by row in a grid of the data's proportions. A UserError for an
    output that is none of this.
    """
    found = [each for each in _tensors(output) if each.ndim in (3, 4)]
    if found and found[0].ndim == 4:
        return found[0]
    if found and hasattr(model, "feature_map"):
        lay_out: Any = model.feature_map
        return lay_out(found[0], size)
    if found and (grid := _grid(found[0].shape[1], size or (1, 1))):
        return rearrange(found[0], "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    shapes = [tuple(each.shape) for each in _tensors(output)]
    given = f"a tensor of shape {shapes[0]}" if shapes else f"a {type(output).__name__} without tensors"
    raise UserError(
        f"tap '{name}' gives {given}, but a tap must give one feature map (B, C, h, w), or tokens (B, h * w, C) of a "
        "grid; with further tokens, give the model a feature_map(tokens, size), or the alignment a `select`"
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):  # diffusers' are both
        output = vars(output)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return [value for value in values if isinstance(value, Tensor)]


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many tokens, in the proportions of `size`."""
    rows = math.isqrt(tokens * size[0] // size[1])
    columns = tokens // max(rows, 1)
    return (rows, columns) if rows * columns == tokens and rows * size[1] == columns * size[0] else None


def tap_shape(denoiser: Pretrained, tap: str, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the feature map at `tap`, found by a run on the meta device with data of `size` (H, W)."""
    taps = Taps(denoiser, [tap])
    try:
        forward_on_meta(denoiser, *size)
        _, channels, rows, columns = taps.feature_map(taps.take()[tap], tap).shape
        return channels, rows, columns
    finally:
        taps.remove()


@contextmanager
def quiet_run(model: nn.Module) -> Iterator[None]:
    """While entered, running the model changes nothing of it: no gradients, no dropout, no running statistics."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def call(model: nn.Module, example: Example) -> Any:
    """The model's output for an example: one tensor, or a sequence or mapping of its arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(example) if isinstance(example, Tensor) else model(*example)


def suggest_taps(model: nn.Module, example: Example) -> list[str]:
    """Names of the modules at the bottom of a U-Net, the best to align first.

    At the bottom are the modules whose feature map is the smallest of all (a map of one pixel does not count). First
    come those that lie least deep in other modules and nearest to the middle of the bottom, as U-REPA's tap does: the
    4th of DiC-XL's 8 middle blocks, `mid_block` of a U-Net of diffusers. Where no map is smaller than another, the
    modules in lists count, such as a transformer's blocks.

    Args:
        example: what the model is called with: a tuple, or a mapping of keyword arguments. It runs once.

    Raises:
        UserError: no module gives a feature map.
    """
    seen: dict[str, list[tuple[int, int]]] = {}  # by name, in the order of their calls, rows and columns
    arguments = (
        example.values() if isinstance(example, Mapping) else [example] if isinstance(example, Tensor) else example
    )
    size = data_size(arguments)

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            try:
                shape = feature_map(model, output, size).shape
            except UserError:
                return
            seen.setdefault(name, []).append((shape[-2], shape[-1]))

        return hook

    composite = [(name, module) for name, module in model.named_modules() if name and any(module.children())]
    handles = [module.register_forward_hook(note(name)) for name, module in composite]
    try:
        with quiet_run(model):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    areas = {name: rows * columns for name, ((rows, columns), *more) in seen.items() if not more and rows * columns > 1}
    if not areas:
        raise UserError("no module of this model gives a feature map (B, C, h, w) or a grid of tokens")
    bottom = [name for name, area in areas.items() if area == min(areas.values())]
    if len(bottom) == len(areas):  # no level is smaller than another, so the first and last layers are there too
        bottom = [name for name in bottom if name.rpartition(".")[2].isdecimal()] or bottom
    depth = min(name.count(".") for name in bottom)
    shallow = [i for i, name in enumerate(bottom) if name.count(".") == depth]
    middle = shallow[(len(shallow) - 1) // 2]
    ranks = {name: (name.count("."), abs(i - middle)) for i, name in enumerate(bottom)}
    return sorted(bottom, key=ranks.__getitem__)
