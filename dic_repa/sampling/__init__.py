"""Sampling a trained run: load it, choose the labels, sample, decode, and write a folder of samples. Needs no torch."""

from typing import Any

from dic_repa.recipe import SampleSection, validate
from dic_repa.samplers.solvers import solver_info

SAMPLES_FILE, SAMPLES_NPZ = "samples.json", "samples.npz"  # in a folder of samples: what they are, and ADM's file


def override_sampling(base: SampleSection, guidance: dict[str, Any] | None = None, **given: Any) -> SampleSection:
    """`base` with the keys `given`, and those of `guidance`, validated as if they stood in a recipe.

    What `base` says to its solver is dropped if another kind of solver is given.
    """
    raw = base.model_dump(mode="json")
    if (solver := given.get("solver")) and _family(solver) != _family(base.solver):
        raw |= dict.fromkeys(SampleSection.solver_keys())
    if guidance:
        raw["guidance"] = {**(raw["guidance"] or {}), **guidance}
    return validate({"sample": raw | given}, "sampling").sample


def _family(solver: str) -> tuple[str, str]:
    info = solver_info(solver)
    return info.process, info.kind
