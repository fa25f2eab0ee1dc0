"""Data sets: what a denoiser trains on, with the images that an encoder sees."""

from dic_repa.data.digits import Digits, load_digits, resize
from dic_repa.data.latent_files import DitLayout, RepaLayout
from dic_repa.data.prepared import Prepared
from dic_repa.data.random_data import RandomData
from dic_repa.data.sources import ImageFolder
from dic_repa.registry import Registry

datasets = Registry("data set", key="data.name")
register_dataset = datasets.register
register_dataset("digits")(Digits)
register_dataset("prepared")(Prepared)
register_dataset("repa")(RepaLayout)
register_dataset("dit")(DitLayout)
register_dataset("images")(ImageFolder)
register_dataset("random")(RandomData)

__all__ = [
    "Digits",
    "DitLayout",
    "ImageFolder",
    "Prepared",
    "RandomData",
    "RepaLayout",
    "datasets",
    "load_digits",
    "register_dataset",
    "resize",
]
