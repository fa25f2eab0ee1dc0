"""Data sets: what a denoiser trains on, with the images that an encoder sees."""

from dic_repa.data.digits import Digits, load_digits, resize
from dic_repa.registry import Registry

datasets = Registry("data set")
register_dataset = datasets.register
register_dataset("digits")(Digits)

__all__ = ["Digits", "datasets", "load_digits", "register_dataset", "resize"]
