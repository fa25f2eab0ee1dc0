"""What sampling needs to know of the training data, saved with the weights: the data may be gone by then."""

import base64
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dic_repa.conditions import ClassLabels, Condition, VectorCondition, class_labels, create_condition
from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.data.autoencoders.places import WEIGHTS
from dic_repa.errors import UserError
from dic_repa.files.reading import read_json
from dic_repa.trust import check_code

DATA_FILE = "data.json"
BESIDE = "./autoencoder"  # the name of an autoencoder that was trained with the weights: its folder beside them


@dataclass(frozen=True)
class SavedData:
    """The autoencoder behind which a model was trained ('none' for pixels), and what it was conditioned on.

    `autoencoder` is None if the data set names none; then the recipe's `data` section decides.
    """

    autoencoder: AutoencoderSpec | None
    condition: Condition  # with the names and counts of classes, or the examples of vectors
    mean: Tensor | None = field(default=None, compare=False)  # (C, H, W), of the denoiser's data, if sampling needs it
    beside: Path | None = field(
        default=None, compare=False
    )  # the autoencoder's folder, if it was trained with the weights

    @classmethod
    def of(cls, data, condition: Condition, mean: Tensor | None = None) -> "SavedData":
        """Of a data set and its condition, with the autoencoder's fingerprint if it is known or loaded."""
        spec = getattr(data, "spec", None)
        loaded = vars(data).get("autoencoder")  # not asked for by its name, which would load it
        if loaded is not None and isinstance(spec, AutoencoderSpec):
            spec = replace(spec, fingerprint=loaded.spec.fingerprint)
        return cls(spec if isinstance(spec, AutoencoderSpec) else None, condition, mean)

    @classmethod
    def read(cls, folder: Path) -> "SavedData | None":
        """Read it from `folder`; None if it is not there, as in older checkpoints."""
        file = folder / DATA_FILE
        if not file.is_file():
            return None
        try:
            content = read_json(file, "remove it")
            spec = content["autoencoder"]
            if "condition" in content:
                condition = create_condition(condition=content["condition"])
                examples = unpack({"numbers": content["examples"], "shape": [-1, *condition.shape]})
                condition = condition.with_examples(examples, content["names"])
            else:
                names = content["class_names"]
                condition = class_labels(len(names), names, content.get("class_counts"))
            mean = unpack(content["mean"]) if "mean" in content else None
            saved = cls(spec and AutoencoderSpec.from_dict(spec), condition, mean)
            if saved.autoencoder and saved.autoencoder.name == BESIDE:
                place = (folder / BESIDE).resolve()
                saved = replace(saved, autoencoder=replace(saved.autoencoder, name=str(place)), beside=place)
        except (ValueError, KeyError, TypeError, AttributeError):  # a UserError is a ValueError
            raise UserError(f"{file} is damaged; remove it to sample by the recipe's data alone") from None
        if saved.autoencoder:
            check_code({"autoencoder": saved.autoencoder.name}, file)
        return saved

    def write(self, folder: Path) -> None:
        """Keep it in `folder`, with an autoencoder that was trained with the weights: numbers as little-endian float32
        in base64."""
        condition = self.condition
        content: dict = {"autoencoder": self.autoencoder and self.autoencoder.to_dict()}
        if self.beside:
            content["autoencoder"]["name"] = BESIDE
            (folder / BESIDE).mkdir()
            for name in ("config.json", WEIGHTS):
                shutil.copyfile(self.beside / name, folder / BESIDE / name)
        if isinstance(condition, VectorCondition):
            examples = pack(condition.examples)["numbers"]
            content |= {"condition": condition.to_dict(), "names": list(condition.names), "examples": examples}
        else:
            content["class_names"] = condition.names
            if isinstance(condition, ClassLabels) and condition.counts:
                content["class_counts"] = condition.counts
        if self.mean is not None:
            content["mean"] = pack(self.mean)
        (folder / DATA_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pack(tensor: Tensor) -> dict:
    """A tensor for a JSON file, in float32."""
    numbers = base64.b64encode(tensor.cpu().numpy().astype("<f4").tobytes()).decode()
    return {"numbers": numbers, "shape": list(tensor.shape)}


def unpack(packed: dict) -> Tensor:
    """The tensor again; a ValueError, KeyError or TypeError if it is damaged."""
    numbers = np.frombuffer(base64.b64decode(packed["numbers"]), dtype="<f4")
    return torch.from_numpy(numbers.reshape(packed["shape"]).copy())
