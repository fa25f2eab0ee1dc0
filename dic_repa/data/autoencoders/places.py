"""Where an autoencoder's files are: a local folder or a hub id, and what is said where they cannot be had."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dic_repa.data.autoencoders.base import list_autoencoders
from dic_repa.errors import UserError, did_you_mean, first_line
from dic_repa.files.hub import pin

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Place:
    """A folder or a hub id, and in it the subfolder of a pipeline, or a file."""

    root: str
    inner: str = ""

    @classmethod
    def of(cls, name: str) -> "Place":
        """The place of `name`, with ':' before what is inside it; a folder becomes absolute, since data and checkpoints
        that record it are read from other folders than they were made in.
        """
        root, _, inner = (name, "", "") if Path(name).is_dir() else name.partition(":")
        return cls(str(Path(root).resolve()) if Path(root).is_dir() else root, inner)

    def __str__(self) -> str:
        return f"{self.root}:{self.inner}" if self.inner else self.root

    @property
    def is_folder(self) -> bool:
        return Path(self.root).is_dir()

    @property
    def is_hub_id(self) -> bool:
        return not self.is_folder and not self.root.startswith((".", "/", "~")) and self.root.count("/") == 1

    def pinned(self) -> tuple[str, str | None]:
        """What diffusers and the hub's client take: a folder, or the repository and its commit."""
        return pin(self.root) if self.is_hub_id else (self.root, None)

    def file(self, name: str) -> Path:
        """A file of it, downloaded if this is a hub id. An error of the hub's client if there is none."""
        if self.is_folder:
            return Path(self.root, self.inner, name)
        from huggingface_hub import hf_hub_download

        repository, commit = self.pinned()
        return Path(hf_hub_download(repository, name, subfolder=self.inner or None, revision=commit))

    def fault(self, error: BaseException, files: str, kind: str, named: str = "folder") -> UserError:
        """One line for an `error` of diffusers or the hub: what to get and where to put it."""
        if self.is_folder:
            return UserError(f"{self} holds no autoencoder: it takes {files} of {kind} ({first_line(error)})")
        if not self.is_hub_id:
            near = "" if "/" in self.root else did_you_mean(self.root, list_autoencoders())
            return UserError(f"there is no autoencoder '{self}': name a local folder or a hub id{near}")
        address = f"https://huggingface.co/{self.root.partition('@')[0]}/tree/main/{self.inner}".rstrip("/")
        return UserError(
            f"the autoencoder {self} cannot be fetched from the hub; download {files} from {address} into a folder "
            f"and name that {named} in its place"
        )


@contextlib.contextmanager
def opening(place: Place, kind: str) -> Iterator[dict[str, Any]]:
    """diffusers' options for `place`; in the block its errors, many lines long, become one line, and what it would say
    of this class or that file is left unsaid.
    """
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # About an argument that diffusers itself passes to the hub's client.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
            if not (place.is_folder or place.is_hub_id):
                raise OSError  # else diffusers would ask the hub for a minute
            root, commit = place.pinned()
            yield {"pretrained_model_name_or_path": root, "revision": commit, "subfolder": place.inner or None}
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ArithmeticError) as error:
        raise place.fault(error, f"config.json and {WEIGHTS}", f"diffusers.{kind}") from None
    finally:
        logging.set_verbosity(verbosity)
