"""Each preset against what its source counts: parameters and multiply-accumulates."""

from __future__ import annotations

import pytest
import torch

from dic_repa.models import create_denoiser, measure_cost
from dic_repa.models.presets import PRESETS

COUNTED = {name: preset.counts for name, preset in PRESETS.items() if preset.counts}


@pytest.mark.parametrize("name", COUNTED)
def test_a_preset_has_what_its_source_counts(name):
    counts = COUNTED[name]
    with torch.device("meta"):
        for size in counts.gmacs or [32]:
            own = {"size": size} if PRESETS[name].kind == "UViT" else {}  # its positions are learnt for one size
            data = {"in_channels": 4, "num_classes": 1000}
            cost = measure_cost(create_denoiser(name, **{**data, **counts.options, **own}), size)
            if size in counts.gmacs:
                assert cost.macs / 1e9 == pytest.approx(counts.gmacs[size], rel=0.005)
            if counts.parameters:
                assert cost.parameters / 1e6 == pytest.approx(counts.parameters, rel=0.005)


def test_a_preset_s_source_is_named():
    assert all(counts.source and (counts.parameters or counts.gmacs) for counts in COUNTED.values())
