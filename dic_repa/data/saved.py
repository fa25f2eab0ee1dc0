"""What sampling needs to know of the training data, kept beside the weights: the data may be elsewhere by then."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.errors import UserError

DATA_FILE = "data.json"


@dataclass(frozen=True)
class SavedData:
    """The autoencoder behind which a model was trained ('none' for pixels), and the names of its classes.

    `autoencoder` is None for a data set that does not tell; then the recipe's `data` section decides.
    """

    autoencoder: AutoencoderSpec | None
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, data) -> SavedData:
        """That of a data set; with the fingerprint of the autoencoder's weights, where they are known or loaded."""
        loaded = vars(data).get("autoencoder")  # not asked for by its name, which would load it
        spec = getattr(loaded, "spec", None) or getattr(data, "spec", None)
        names = getattr(data, "class_names", range(data.num_classes))
        return cls(spec if isinstance(spec, AutoencoderSpec) else None, tuple(map(str, names)))

    @classmethod
    def read(cls, folder: Path) -> SavedData | None:
        """What is beside the weights in `folder`; None where nothing is, as of older checkpoints and of others'."""
        file = folder / DATA_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            spec = content["autoencoder"]
            return cls(spec and AutoencoderSpec.from_dict(spec), tuple(content["class_names"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is damaged; remove it to sample by the recipe's data alone") from None

    def write(self, folder: Path) -> None:
        """Keep it in `folder`."""
        content = {
            "autoencoder": self.autoencoder and self.autoencoder.to_dict(),
            "class_names": self.class_names,
        }
        (folder / DATA_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
