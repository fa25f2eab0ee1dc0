"""The data sets by name: each module of this package registers its own."""

from dic_repa.registry import Registry

datasets = Registry("data set", modules=["dic_repa.data.*"], key="data.name")
register_dataset = datasets.register
"""Decorator that registers its class as the data set of this name."""
