"""What input may do to a terminal: nothing."""

from __future__ import annotations

import pytest

from dic_repa.cli import main
from dic_repa.errors import UserError, printable
from dic_repa.runtime.progress import print_result, say, warn
from dic_repa.runtime.table import format_rows

HOSTILE = "a\x1b[31mb\rc\x00d\x9be\u202ef\udcffg"
SHOWN = r"a\x1b[31mb\rc\x00d\x9be\u202ef\udcffg"


def test_control_characters_are_shown_as_codes(capsys):
    assert printable(HOSTILE) == SHOWN
    assert printable("déjà vu 画像\tok\n") == "déjà vu 画像\tok\n"
    for show in (print_result, say, warn):
        show(HOSTILE)
        assert SHOWN in "".join(capsys.readouterr())
    assert format_rows([["name", "x"], [f"{HOSTILE}\nerror: all is lost", "1"]], left=(0,)).count("\n") == 1
    assert str(UserError(f"there is no {HOSTILE}\nerror: x")) == f"there is no {SHOWN} error: x"


def test_a_message_has_an_end():
    message = str(UserError("no number: " + "9" * 10**6 + "; give one"))
    assert len(message) < 1300
    assert message.endswith("; give one")


@pytest.mark.parametrize("arguments", [["sample", "{}"], ["train", "{}"], ["{}"], ["info", "--{}"]])
def test_an_argument_in_an_error(arguments, capsys):
    arguments = [word.format(HOSTILE.replace("\x00", "")) for word in arguments]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "digits-urepa", "--out", ""], "the value behind --out is empty"),
        (["train", "digits-urepa", "--out="], "the value of --out is empty"),
        (["train", "digits-urepa", "--set", " "], "the value behind --set is empty"),
        (["sample", ""], "the value behind sample is empty"),
        ([""], "an argument is empty"),
    ],
)
def test_empty_values(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err == f"error: {said}\n"
