"""`dic-repa env`."""

import json

import click


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool):
    """Print what a bug report needs: versions, devices, threads, what launchers have set, where caches are.

    \b
    Examples:
      dic-repa env
      dic-repa env --json > environment.json
    """
    from dic_repa.runs.environment import describe_installation

    found = describe_installation()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    width = max(len(key) for section in found.values() for key in section)
    for title, section in found.items():
        click.echo(f"{title}:")
        for key, value in section.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            click.echo(f"  {key:{width}}  {'none' if shown is None else shown}")
