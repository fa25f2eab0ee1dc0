"""What sampling needs to know of the training data, saved with the weights: the data may be gone by then."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dic_repa.conditions import (
    Condition,
    VectorCondition,
    class_labels,
    create_condition,
    pack_examples,
    unpack_examples,
)
from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.errors import UserError

DATA_FILE = "data.json"


@dataclass(frozen=True)
class SavedData:
    """The autoencoder behind which a model was trained ('none' for pixels), and what it was conditioned on.

    `autoencoder` is None if the data set names none; then the recipe's `data` section decides.
    """

    autoencoder: AutoencoderSpec | None
    condition: Condition  # with the names of classes, or the examples of vectors

    @classmethod
    def of(cls, data, condition: Condition) -> SavedData:
        """Of a data set and its condition, with the autoencoder's fingerprint if it is known or loaded."""
        loaded = vars(data).get("autoencoder")  # not asked for by its name, which would load it
        spec = getattr(loaded, "spec", None) or getattr(data, "spec", None)
        return cls(spec if isinstance(spec, AutoencoderSpec) else None, condition)

    @classmethod
    def read(cls, folder: Path) -> SavedData | None:
        """Read it from `folder`; None if it is not there, as in older checkpoints."""
        file = folder / DATA_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            spec = content["autoencoder"]
            return cls(spec and AutoencoderSpec.from_dict(spec), _read_condition(content))
        except (ValueError, KeyError, TypeError, UserError):
            raise UserError(f"{file} is damaged; remove it to sample by the recipe's data alone") from None

    def write(self, folder: Path) -> None:
        """Keep it in `folder`."""
        content = {
            "autoencoder": self.autoencoder and self.autoencoder.to_dict(),
            **_write_condition(self.condition),
        }
        (folder / DATA_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_condition(condition: Condition) -> dict[str, Any]:
    if isinstance(condition, VectorCondition):
        return {"condition": condition.to_dict(), **pack_examples(condition)}
    return {"class_names": condition.names}


def _read_condition(content: dict[str, Any]) -> Condition:
    if "condition" not in content:
        return class_labels(len(content["class_names"]), content["class_names"])
    condition = create_condition(condition=content["condition"])
    if not isinstance(condition, VectorCondition):
        raise ValueError(f"no examples go with {condition.describe()}")
    return unpack_examples(condition, content)
