"""A verb of the command line, called in this process."""

from __future__ import annotations

import click
from click.testing import CliRunner

from dic_repa.errors import UserError


def invoke(verb: click.Command, *arguments: object, fails: bool = False) -> str:
    """The verb's standard output, or its error of one line where it `fails`."""
    result = CliRunner().invoke(verb, [str(argument) for argument in arguments])
    if fails:
        assert isinstance(result.exception, UserError), result.output
        assert "\n" not in str(result.exception)
        return str(result.exception)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output
