"""Compile a whole small DiC, forward and backward, and compare it with the oracle: outputs and all gradients to 1e-4.

    python tests/scripts/compare_compiled.py

The tests compile one block, and trace the whole: generating the code of the whole takes more than a minute of a core.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import torch
from oracle_pairs import TOLERANCE, assert_close, inputs, outputs_and_gradients, pair

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--depths", type=int, nargs=5, default=[1, 1, 1, 1, 1])
    arguments = parser.parse_args()
    model, oracle = pair(width=arguments.width, depths=arguments.depths)
    expected = outputs_and_gradients(oracle, oracle, inputs())
    begin = time.monotonic()
    found = outputs_and_gradients(torch.compile(model), model, inputs())
    seconds = time.monotonic() - begin
    errors = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    worst = max(errors.keys() - {"output"}, key=errors.get)
    print(
        f"relative error of the output {errors['output']:.1e}, of {len(errors) - 1} gradients at most "
        f"{errors[worst]:.1e} ({worst}); {seconds:.0f} s with compiling"
    )
    assert_close(found, expected)
    print(f"equal to {TOLERANCE:g}")
