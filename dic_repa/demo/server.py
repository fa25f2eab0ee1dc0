"""Serves the page on one address, and keeps the browser from asking anybody else for anything."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders

from dic_repa.demo.page import Page, fitting, looks
from dic_repa.errors import UserError

# Gradio's own page may name scripts and fonts of other hosts: they are taken out, and with the policy the browser would
# refuse them.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'self'; base-uri 'self'"
)
FOREIGN = re.compile(rb"<(?:link|script)\b[^>]*\b(?:href|src)=[\"']?https?://[^>]*>(?:\s*</script>)?")
_CLOSED = {"ssr_mode": False, "mcp_server": False, "run_history": False, "enable_monitoring": False, "pwa": False}


class OnlyFromHere:
    """An ASGI middleware: no answer lets the browser ask another host for anything."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun: list[Any] = []  # of a page: its head, until its body is known
        body = b""

        async def checked(message: Any) -> None:
            nonlocal body
            headers = MutableHeaders(scope=message) if "headers" in message else MutableHeaders()
            if message["type"] == "http.response.start":
                headers["Content-Security-Policy"], headers["Referrer-Policy"] = POLICY, "no-referrer"
                if headers.get("content-type", "").startswith("text/html"):
                    begun.append(message)
                    return
            if begun:
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                message = {"type": "http.response.body", "body": FOREIGN.sub(b"", body)}
                MutableHeaders(scope=begun[0])["content-length"] = str(len(message["body"]))
                await send(begun.pop())
            await send(message)

        if scope.get("path") == "/":  # not compressed
            scope = scope | {
                "headers": [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
            }
        await self.app(scope, receive, checked)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; a UserError names a free port if this one is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}; name an address of this machine") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use; take another, such as --port {free_port(host, port)}") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs more rights; take one above 1023, such as --port 7860") from None
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}; name another --host") from None
    return listening


def free_port(host: str, port: int) -> int:
    """A free port, the next behind `port` if there is one among the next hundred."""
    for candidate in [*range(port + 1, min(port + 100, 65536)), 0]:
        with contextlib.suppress(OSError), socket.create_server((host, candidate)) as found:
            return found.getsockname()[1]
    return 0


def make_app(page: Page) -> FastAPI:
    """The page as a web application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    options = {"footer_links": [], "max_file_size": 1, "allowed_paths": [], "show_error": True} | _CLOSED
    gr.mount_gradio_app(app, page.blocks, path="/", **fitting(gr.mount_gradio_app, options | looks()))
    app.add_middleware(OnlyFromHere)
    return app


def make_server(page: Page) -> uvicorn.Server:
    """What serves it: `run(sockets=[listen(...)])`."""
    return uvicorn.Server(uvicorn.Config(make_app(page), log_level="warning", timeout_graceful_shutdown=1))
