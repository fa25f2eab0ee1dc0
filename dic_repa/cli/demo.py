"""`dic-repa demo`."""

from __future__ import annotations

import importlib.util
import ipaddress
import threading

import click

from dic_repa.cli import completion
from dic_repa.cli.report import open_in_browser
from dic_repa.errors import UserError, when_interrupted
from dic_repa.runtime.progress import print_result, say
from dic_repa.runtime.threads import choose_threads


@click.command("demo")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...", shell_complete=completion.runs)
@click.option("--host", default="127.0.0.1", help="The address to listen on; 0.0.0.0: whoever reaches this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, help="0: any that is free.")
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
def command(checkpoints: tuple[str, ...], host: str, port: int, show: bool):
    """A local page to sample from CHECKPOINTs: runs, of which all checkpoints are offered, or single checkpoints.

    Choose classes, solver, steps, guidance and seed; see the samples as they come, their way from the noise, and
    several checkpoints side by side. The page is for this machine alone unless --host says otherwise, and asks no other
    machine for anything. Ctrl-C ends it.

    \b
    Examples:
      dic-repa demo runs/digits-urepa --open
      dic-repa demo runs/digits-urepa runs/digits-baseline
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install 'dic-repa[demo]'")

    from dic_repa.demo.address import listen

    with listen(host, port) as listening:
        from dic_repa.demo.models import Models
        from dic_repa.runtime.processes import start_processes

        choose_threads()
        models = Models(checkpoints, start_processes().device)

        from dic_repa.demo.page import Page
        from dic_repa.demo.server import make_server

        page = Page(models)
        address, port, *_ = listening.getsockname()
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        print_result(f"the demo is at {url}; Ctrl-C ends it")
        if not ipaddress.ip_address(address).is_loopback:
            say("note: whoever reaches this machine can use the page")
        if show:
            threading.Thread(target=_open, args=[url], daemon=True).start()
        with when_interrupted(lambda: "the demo has ended"):
            try:
                make_server(page).run(sockets=[listening])
            finally:
                page.stop_all()


def _open(url: str) -> None:
    if not open_in_browser(url):
        say(f"note: no browser could be opened; the page is {url}")
