"""Data sets: what a denoiser trains on, with the images that an encoder sees."""

from dic_repa.data.digits import Digits, load_digits, resize
from dic_repa.data.emoji import Emoji
from dic_repa.data.latent_files import DitLayout, RepaLayout
from dic_repa.data.prepared import Prepared
from dic_repa.data.random_data import RandomData
from dic_repa.data.registry import datasets, register_dataset
from dic_repa.data.sources import ImageFolder
from dic_repa.data.streaming import Stream
from dic_repa.data.webdataset import WebDataset

__all__ = [
    "Digits",
    "DitLayout",
    "Emoji",
    "ImageFolder",
    "Prepared",
    "RandomData",
    "RepaLayout",
    "Stream",
    "WebDataset",
    "datasets",
    "load_digits",
    "register_dataset",
    "resize",
]
