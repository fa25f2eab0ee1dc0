"""The methods of docs/methods.md in small runs, several in each, for tests in one process and in two."""

from __future__ import annotations

from pathlib import Path

from small_runs import SMALL

from dic_repa.recipe import load_recipe
from dic_repa.runs import RunFolder
from dic_repa.training import train

TINY = [*(key for key in SMALL if key != "alignments=[]"), "train.steps=4", "train.checkpoint_every=2"]
SELF = "{tap: enc.1.0, teacher: {name: self-alignment, tap: dec.1.0}, head: linear, loss: smooth-l1}"
SYNC = "{tap: enc.1.0, teacher: {name: layer-sync, tap: dec.1.0}, head: identity, manifold_weight: 0.0}"
APART = "{tap: enc.1.0, loss: dispersive, head: identity}"
LAYERS = "alignments.0.encoder_options={layer: [-1, -2], combine: concat}"
METHODS = {  # a recipe, and what is changed of it
    "without-encoder": ("digits-decay", [f"alignments=[{SELF}, {SYNC}, {APART}]"]),
    "contrastive": ("digits-irepa", [
        "objective.name=contrastive-flow-matching", "model.options={middle_head: mid.0}", "optimizer.name=muon",
        "optimizer.weight_decay=0.01", "optimizer.decay_on=matrices",
    ]),
    "meanflow": ("digits-vshape", [
        "objective={name: meanflow, options: {span_share: 0.5}}", "model.options={two_times: true}",
        "alignments.0.head_options.hidden=16",
    ]),
    "end-to-end": ("digits-repa-e", ["alignments.0.head_options.hidden=16"]),
    "adapter": ("digits-masked-adapter", [LAYERS, "train.ema_half_life=20"]),
}  # fmt: skip


UNSHARDED = ("end-to-end",)


def method_run(path: Path, name: str, *overrides: str, **options) -> RunFolder:
    recipe, keys = METHODS[name]
    return train(load_recipe(recipe, [*TINY, *keys, *overrides]), path, **options)
