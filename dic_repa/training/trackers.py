"""Who is told the metrics besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, through Accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from accelerate import Accelerator

from dic_repa.errors import UserError
from dic_repa.recipe import Recipe
from dic_repa.training.run_folder import RunFolder


def check_trackers(names: list[str]) -> None:
    """A UserError where a tracker is not installed, which Accelerate would leave out in silence."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name} is not installed: pip install 'dic-repa[{name}]', or leave it out")


def start_trackers(accelerator: Accelerator, run: RunFolder, recipe: Recipe) -> None:
    """Tell the recipe's trackers of the run; W&B and trackio group runs under the project 'dic-repa'."""
    if accelerator.log_with:
        config = {key: value if isinstance(value, int | float | str | bool) else str(value)
                  for key, value in _flat(recipe.model_dump(mode="json"))}  # fmt: skip
        accelerator.init_trackers("dic-repa", config, {
            "wandb": {"name": run.path.name, "dir": str(run.path)},
            "trackio": {"name": run.path.name},
        })  # fmt: skip


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value
