"""`dic-repa bench`: the group; each of its verbs is a module beside this one, imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

VERBS = {
    "data": "How fast the data comes, and the share of a training step spent waiting for it.",
}


class BenchGroup(click.Group):
    def list_commands(self, _context):
        return list(VERBS)

    def get_command(self, _context, name):
        return import_module(f"dic_repa.cli.bench_{name}").command if name in VERBS else None

    def format_commands(self, _context, formatter):
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group("bench", cls=BenchGroup)
def command():
    """Measure speed.

    \b
    Examples:
      dic-repa bench data mine.yaml
      dic-repa bench data mine.yaml --set data.workers=8 --json
    """
