"""A hub on this machine: what huggingface_hub's client asks for when it uploads and downloads, and no more.

All files are "regular" to it, so that a commit brings them whole; the real hub takes large ones by another way.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dic_repa.files import hub
from dic_repa.files.hub import offline_without_network
from dic_repa.runs import environment


@dataclass
class Hub:
    """Files by repository, branch and name; `validated` are the cards that it was asked about."""

    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    validated: list[dict] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    refuses: int | None = None  # the status of its answer to a new repository
    faults: str = ""  # of a card

    def commit(self, repository: str, branch: str) -> str:
        files = self.repositories[repository][branch]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def branch_of(self, repository: str, revision: str) -> str | None:
        branches = self.repositories.get(repository, {})
        return next((name for name in branches if revision in (name, self.commit(repository, name))), None)


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        @property
        def site(self) -> str:
            return f"http://{self.headers['Host']}"

        def answer(self, content: object, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, what: str) -> None:
            self.answer({"error": what}, 404, X_Error_Code=what)

        def do_POST(self):
            body, path = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.path.partition("?")[0]
            if path == "/api/validate-yaml":
                hub.validated.append(json.loads(body))
                faults = [{"message": hub.faults}] if hub.faults else []
                self.answer({"errors": faults, "warnings": []}, 400 if faults else 200)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if hub.refuses:
                    return self.answer({"error": "refused"}, hub.refuses)
                hub.private.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
                hub.repositories.setdefault(name, {"main": {}})
                self.answer({"url": f"{self.site}/{name}", "name": name, "id": name})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
                branches = hub.repositories[found[1]]
                branches.setdefault(found[2], dict(branches["main"]))
                self.answer({})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                files = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                self.take(hub.repositories[found[1]][found[2]], body)
                commit = hub.commit(found[1], found[2])
                self.answer({"commitUrl": f"{self.site}/{found[1]}/commit/{commit}", "commitOid": commit})
            else:
                self.missing("EntryNotFound")

        def take(self, files: dict[str, bytes], body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]

        def do_GET(self):
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
                files = hub.repositories[found[1]][hub.branch_of(found[1], found[2]) or "main"]
                listed = [(name, {"size": len(c), "oid": hashlib.sha1(c).hexdigest()}) for name, c in files.items()]
                return self.answer([{"type": "file", "path": name, **facts} for name, facts in listed])
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                branch = hub.branch_of(found[1], found[2] or "main")
                if branch is None:
                    return self.missing("RepoNotFound" if found[1] not in hub.repositories else "RevisionNotFound")
                files = [{"rfilename": name} for name in hub.repositories[found[1]][branch]]
                return self.answer({"id": found[1], "sha": hub.commit(found[1], branch), "siblings": files})
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            branch = found and hub.branch_of(found[1], found[2])
            if not found or branch is None:
                return self.missing("RepoNotFound")
            content = hub.repositories[found[1]][branch].get(found[3])
            if content is None:
                return self.missing("EntryNotFound")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, X_Repo_Commit=hub.commit(found[1], branch), ETag=etag)

        do_HEAD = do_GET

    return Handler


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, folder) -> Iterator[Hub]:
    """huggingface_hub asks a hub of this process, logged in, with an empty cache in `folder`."""
    from huggingface_hub import constants

    fake = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(fake))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "PINS", {})
    monkeypatch.setattr(environment, "PINS", hub.PINS)
    offline_without_network.cache_clear()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        offline_without_network.cache_clear()
