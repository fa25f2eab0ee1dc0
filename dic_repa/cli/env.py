"""`dic-repa env`."""

import json

import click

from dic_repa.runtime.progress import print_result


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
        print_result(json.dumps(found, indent=2))
        return
    width = max(len(key) for section in found.values() for key in section)
    for title, section in found.items():
        print_result(f"{title}:")
        for key, value in section.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            print_result(f"  {key:{width}}  {'none' if shown is None else shown}")
