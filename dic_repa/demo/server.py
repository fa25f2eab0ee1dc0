"""Serves the page, and keeps the browser from asking anybody else for anything."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders

from dic_repa.demo.page import Page, fitting, looks

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


def make_app(page: Page) -> FastAPI:
    """The page as a web application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    options = {"footer_links": [], "max_file_size": 1, "allowed_paths": [], "show_error": True} | _CLOSED
    gr.mount_gradio_app(app, page.blocks, path="/", **fitting(gr.mount_gradio_app, options | looks()))
    app.add_middleware(OnlyFromHere)
    return app


def make_server(page: Page) -> uvicorn.Server:
    """What serves it: `run(sockets=[...])`."""
    return uvicorn.Server(uvicorn.Config(make_app(page), log_level="warning", timeout_graceful_shutdown=1))
