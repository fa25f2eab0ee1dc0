"""A group of verbs that knows the near names of a misspelt one."""

import click

from dic_repa.errors import unknown_name


class Group(click.Group):
    """A `click.Group` whose error for an unknown verb lists the known ones."""

    def resolve_command(self, context, args):
        if args and args[0] not in (known := self.list_commands(context)):
            kind = "verb" if context.parent is None else f"{self.name} verb"
            raise unknown_name(kind, args[0], known)
        return super().resolve_command(context, args)
