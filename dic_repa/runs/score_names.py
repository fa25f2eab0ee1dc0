"""What scores are called in records, apart from what computes them: who only reads a record has no need of torch."""

from __future__ import annotations


def current_names(scores: dict) -> dict:
    """The scores of a record by the names of today: earlier versions kept fd-digits as `frechet`."""
    renamed = {"fd-digits" if name == "frechet" else name: value for name, value in scores.items()}
    return {name: current_names(value) if name == "reference" else value for name, value in renamed.items()}
