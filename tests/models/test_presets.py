"""Each preset against what its source counts: parameters and multiply-accumulates."""

from __future__ import annotations

import pytest
from make_tables import COUNTS_PAGE, count, count_row

from dic_repa.models.presets import PRESETS

COUNTED = {name: preset.counts for name, preset in PRESETS.items() if preset.counts}
LINES = COUNTS_PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", COUNTED)
def test_a_preset_has_what_its_source_counts_and_its_line_in_the_docs(name):
    counts, ours = COUNTED[name], count(name)
    parameters, macs = counts.beside
    for size, gmacs in counts.gmacs.items():
        assert ours[size].macs / 1e9 + macs == pytest.approx(gmacs, rel=0.005)
    if counts.parameters:
        assert next(iter(ours.values())).parameters / 1e6 + parameters == pytest.approx(counts.parameters, rel=0.005)
    assert count_row(name, ours) in LINES, "call: python tests/scripts/make_tables.py"


def test_a_preset_s_source_is_named():
    assert all(counts.source and (counts.parameters or counts.gmacs) for counts in COUNTED.values())
