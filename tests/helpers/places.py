"""Where the tests' files are."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
FIXTURES, HELPERS, SCRIPTS = TESTS / "fixtures", TESTS / "helpers", TESTS / "scripts"
