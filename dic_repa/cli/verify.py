"""`dic-repa verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.options import PATH, json_option
from dic_repa.errors import is_main_process
from dic_repa.runtime.progress import print_result


@click.command("verify")
@click.argument("path", type=PATH, shell_complete=completion.runs)
@json_option()
@click.pass_context
def command(context: click.Context, path: Path, as_json: bool):
    """Look whether PATH is as it was written: what is damaged, and how to mend it.

    PATH is a run, a checkpoint, a saved or converted model, a folder of samples, a prepared data set, a feature cache,
    or a folder of these. Sizes and checksums are compared, images decoded; nothing is changed. Exits with 0 if all is
    whole, 1 if something is damaged, 2 if there is nothing to verify.

    \b
    Examples:
      dic-repa verify runs/digits-urepa
      dic-repa verify data/imagenet256
      dic-repa verify samples/xl --json
      dic-repa verify ~/.cache/dic-repa/features
    """
    if not is_main_process():
        return

    from dic_repa.sampling.verify import verify

    found = []
    for finding in verify(path):
        found.append(finding)
        if as_json:
            continue
        note = f" ({finding.note})" if finding.note else ""
        print_result(f"{'damaged' if finding.damage else 'whole':8} {finding.path}{note}")
        if finding.damage:
            print_result(f"{'':8} {finding.damage}\n{'':8} to mend: {finding.mend}")
    damaged = sum(bool(finding.damage) for finding in found)
    if as_json:
        print_result(json.dumps([{**vars(finding), "path": str(finding.path)} for finding in found], indent=2))
    else:
        print_result(f"{damaged} of {len(found)} are damaged" if damaged else f"all {len(found)} are whole")
    context.exit(1 if damaged else 0)
