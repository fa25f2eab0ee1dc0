"""A folder that diffusers opens: pipeline.py, denoiser/, vae/ if there is one, and a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dic_repa.data.autoencoders import KLAutoencoder
from dic_repa.data.autoencoders.load import is_from_hub
from dic_repa.errors import UserError
from dic_repa.export.diffusers_denoiser import DicRepaDenoiser
from dic_repa.export.diffusers_pipeline import DicRepaPipeline
from dic_repa.export.programs import Run
from dic_repa.models.pretrained import Pretrained
from dic_repa.objectives.base import run_denoiser
from dic_repa.recipe.build import build_autoencoder
from dic_repa.sampling.load import Checkpoint

CARD = """---
library_name: diffusers
tags: [dic-repa, {kind}]
---

# {name}

A {kind} in {dtype}, conditioned on {condition}, exported by dic-repa {version}. The pipeline's code, `pipeline.py` and
`denoiser/denoiser.py`, imports dic-repa, which must be installed:

    from diffusers import DiffusionPipeline
{imports}
    pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    pipeline(num_images=4, num_inference_steps=20).images[0].save("image.png")

`trust_remote_code=True` runs the two files above: read them first.
"""


def write_pipeline(
    folder: Path, model: Checkpoint, denoiser: Pretrained, record: dict[str, Any], autoencoder: str | None
) -> tuple[str, Run]:
    """Fill `folder`: the name of its index, and the denoiser as read back from it.

    Args:
        denoiser: that of `model` in the dtype to write.
        record: what `exporting.describe` gives; how the autoencoder is named in it may change.
        autoencoder: where it is now, if no longer under its name.
    """
    vae = _autoencoder(model, record, autoencoder)
    wrapped = DicRepaDenoiser(kind=type(denoiser).__name__, options=denoiser.config)
    wrapped.model = denoiser
    DicRepaPipeline(wrapped, vae, record).save_pretrained(folder)
    kind, module = type(denoiser).__name__, type(denoiser).__module__
    own = "" if module.startswith("dic_repa.") else f"    import {module}  # yours: it defines {kind}\n"
    (folder / "README.md").write_text(
        CARD.format(
            name=record["model"]["name"], kind=kind, dtype=record["dtype"], version=record["dic_repa"], imports=own,
            condition=denoiser.conditioned_on.describe(),
        ), encoding="utf-8",
    )  # fmt: skip
    saved = DicRepaDenoiser.from_pretrained(folder / "denoiser", torch_dtype=next(denoiser.parameters()).dtype)
    return DicRepaPipeline.config_name, lambda x, t, y: run_denoiser(saved, x, t, y)


def _autoencoder(model: Checkpoint, record: dict[str, Any], place: str | None) -> Any:
    """The autoencoder that is copied, from a folder of this machine; None for one of the hub, and for pixels."""
    spec = model.data and model.data.autoencoder
    name = place or (spec.name if spec else model.recipe.data.autoencoder) or ""
    if record["autoencoder"] and record["autoencoder"]["name"] == "none":
        return None
    if record["autoencoder"] and is_from_hub(name):
        record["autoencoder"]["name"] = name
        return None
    loaded = build_autoencoder(model.recipe.data, "cpu", model.data, place)
    inner = getattr(loaded, "autoencoder", loaded)  # of one whose data are normalised in another way
    if not isinstance(inner, KLAutoencoder):
        raise UserError(
            f"a diffusers folder can hold diffusers' autoencoders alone, not {loaded.spec.name}; take the format "
            "torch or onnx, and decode with it"
        )
    record["autoencoder"] = loaded.spec.to_dict() | {"name": "vae"}
    return inner.model
