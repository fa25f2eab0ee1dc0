"""The short form of the attack: some cases of each class, by the same rules as the long form."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from places import SCRIPTS


@pytest.mark.slow
def test_nothing_comes_through(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, SCRIPTS / "attack_long.py", "--jobs=1", f"--failures={tmp_path / 'failures'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"HOME": str(home)})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
