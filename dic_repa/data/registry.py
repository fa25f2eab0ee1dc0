"""The data sets by name: each module of this package registers its own."""

import inspect
from pathlib import Path

from dic_repa.registry import Registry

datasets = Registry("data set", modules=["dic_repa.data.*"], key="data.name")
register_dataset = datasets.register
"""Decorator that registers its class as the data set of this name."""


def named_data(source: str | Path) -> tuple[str, str] | None:
    """The data set and its split that a name such as 'emoji:held-out' stands for; None for anything else.

    Those are the registered data sets that need no further arguments. A path of that name comes first. A name alone
    stands for what is trained on, but 'digits' for the held-out ones: the data set's `reference_split`.
    """
    name, _, split = str(source).partition(":")
    if Path(source).exists() or name not in datasets:
        return None
    factory = datasets.find(name)
    parameters = inspect.signature(factory).parameters.values()
    if "split" not in (p.name for p in parameters) or any(p.default is p.empty for p in parameters):
        return None
    return name, split or getattr(factory, "reference_split", "train")
