"""A hub of our own on 127.0.0.1, and its store of large files on 127.0.0.2, as the client finds them at the real one.

It speaks of models and data sets: their info, the tree in pages, paths-info, and resolve with HEAD. Large files are
redirected to the store by a signed address, which takes ranges and no token; small ones to another path. Repositories
may be gated, and have branches, refs/convert/parquet among them. Every request is kept. It can be out of order.
"""

import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".zip", ".model", ".h5", ".gz")  # what .gitattributes of the hub name
TOKEN = "hf_of_somebody"


@dataclass
class File:
    """The content of one file, at several commits perhaps."""

    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob(self) -> str:
        return hashlib.sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob


@dataclass
class Repository:
    """kind: models or datasets, as addresses call them."""

    kind: str
    name: str
    gated: bool = False
    trees: dict[str, dict[str, File]] = field(default_factory=dict)  # commit -> files
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        """The commit of a revision."""
        return revision if revision in self.trees else self.branches.get(revision)


class Hub:
    """Runs in a thread from `start` to `stop`; the contents stay, and so do the addresses."""

    def __init__(self, page: int = 3):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []  # method and path
        self.allowed = {TOKEN}  # who may read gated repositories
        self.page = page  # files of a page of the tree
        self.status: int | None = None  # what it answers to all but its root, in place of what it should
        self.drops_headers = False  # as a proxy that lets no header of the hub through
        self.cut: int | None = None  # bytes after which the store hangs up, once
        self.ports = {"127.0.0.1": 0, "127.0.0.2": 0}
        self.servers: list[ThreadingHTTPServer] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports['127.0.0.1']}"

    def start(self) -> "Hub":
        for host, handler in (("127.0.0.1", Front), ("127.0.0.2", Store)):
            server = Server((host, self.ports[host]), type(handler.__name__, (handler,), {"hub": self}))
            self.ports[host] = server.server_port
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self.servers.append(server)
        return self

    def stop(self) -> None:
        """From now on nobody answers."""
        while self.servers:
            server = self.servers.pop()
            server.shutdown()
            server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes] | Path, commit: str | None = None, branch: str = "main",
            gated: bool = False) -> str:  # fmt: skip
        """A commit of a repository, with files by their path, or those of a folder; returns it."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        files = {"README.md": b"---\n---\n", ".gitattributes": b"*.bin filter=lfs\n"} | files
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        repository.gated = gated
        tree = {path: File(content, path.endswith(LARGE)) for path, content in sorted(files.items())}
        listed = "".join(f"{path} {file.blob}" for path, file in tree.items())
        commit = commit or hashlib.sha1(f"{name} {listed}".encode()).hexdigest()
        repository.trees[commit] = tree
        repository.branches[branch] = commit
        return commit


class Server(ThreadingHTTPServer):
    """One whose connections end with it."""

    daemon_threads = True

    def __init__(self, *args):
        super().__init__(*args)
        self.connections: list[socket.socket] = []

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def server_close(self):
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_):
        pass  # a client that left


class Handler(BaseHTTPRequestHandler):
    """What both hosts share."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        """HEAD is told the length and not the body."""
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | (headers or {})).items():
            if not (self.hub.drops_headers and key.startswith("X-")):
                self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()


class Front(Handler):
    """The hub."""

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self):
        if self.path == "/api/agent-harnesses":  # the client's own, once a day or a process
            return self.answer(404)
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.path == "/":
            return self.answer(200, b"a hub")
        if self.hub.status:
            return self.answer(self.hub.status, b"out of order")
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        for (kind, name), repository in self.hub.repositories.items():
            if found := re.fullmatch(
                f"/api/{kind}/{re.escape(name)}(?:/(revision|tree|paths-info)/([^/]+)(.*))?", path
            ):
                return self.ask(repository, found[1] or "revision", unquote(found[2] or "main"), query)
            place = re.escape(f"{'datasets/' * (kind == 'datasets')}{name}")
            if found := re.fullmatch(f"/{place}/resolve/([^/]+)/(.+)", path):
                return self.resolve(repository, unquote(found[1]), unquote(found[2]))
            if found := re.fullmatch(f"/api/resolve-cache/{kind}/{re.escape(name)}/([0-9a-f]+)/(.+)", path):
                return self.small(found[1], repository.trees[found[1]][unquote(found[2])])
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"  # a stranger is not told what there is
        self.refuse(
            404 if known else 401, "RepoNotFound", "Repository not found" if known else "Invalid username or password."
        )

    def refuse(self, status: int, code: str, said: str) -> None:
        body = json.dumps({"error": said}).encode()
        self.answer(status, body, {"X-Error-Code": code, "X-Error-Message": said})

    def ask(self, repository: Repository, what: str, revision: str, query: dict) -> None:
        if (commit := repository.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree, link = repository.trees[commit], {}
        if what == "revision":
            siblings = [{"rfilename": path} for path in tree]
            told = {"id": repository.name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            told |= {"gated": "manual" if repository.gated else False, "disabled": False, "downloads": 0, "likes": 0}
        elif what == "paths-info":
            asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            told = [self.entry(path, tree[path]) for path in asked if path in tree]
        else:
            first = int(query.get("cursor", ["0"])[0])
            told = [self.entry(path, file) for path, file in list(tree.items())[first : first + self.hub.page]]
            if first + self.hub.page < len(tree):
                rest = f"{self.hub.address}{urlsplit(self.path).path}?recursive=true&cursor={first + self.hub.page}"
                link = {"Link": f'<{rest}>; rel="next"'}
        self.answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"} | link)

    @staticmethod
    def entry(path: str, file: File) -> dict:
        entry = {"type": "file", "oid": file.blob, "size": len(file.content), "path": path}
        lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        return entry | ({"lfs": lfs} if file.large else {})

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        if (commit := repository.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repository.gated:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in self.hub.allowed:
                said = f"Access to {repository.kind[:-1]} {repository.name} is restricted."
                return self.refuse(403 if token else 401, "GatedRepo", said)
        if (file := repository.trees[commit].get(path)) is None:
            return self.answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        place = f"/api/resolve-cache/{repository.kind}/{repository.name}/{commit}/{path}"
        if file.large:
            place = f"http://127.0.0.2:{self.hub.ports['127.0.0.2']}/{file.sha256}?Signature={sign(file)}"
        told = {"X-Repo-Commit": commit, "X-Linked-Size": len(file.content), "X-Linked-ETag": f'"{file.etag}"'}
        self.answer(302 if file.large else 307, b"", told | {"ETag": f'"{file.etag}"', "Location": place})

    def small(self, commit: str, file: File) -> None:
        self.answer(200, file.content, {"X-Repo-Commit": commit, "ETag": f'"{file.blob}"'})


class Store(Handler):
    """Where the large files are. Who asks must have been sent there, and must not bring a token."""

    def do_GET(self):
        self.hub.requests.append(f"{self.command} store {self.path}")
        address = urlsplit(self.path)
        files = {f.sha256: f for r in self.hub.repositories.values() for t in r.trees.values() for f in t.values()
                 if f.large}  # fmt: skip
        file = files.get(address.path[1:])
        if file is None or parse_qs(address.query) != {"Signature": [sign(file)]} or "Authorization" in self.headers:
            return self.answer(403, b"<Error>AccessDenied</Error>")
        content, size, status, told = file.content, len(file.content), 200, {"Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or size - 1)
            content, status, told = content[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{size}"}
        if self.hub.cut is not None and self.command == "GET":
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.hub.cut])
            self.hub.cut, self.close_connection = None, True
            return None
        return self.answer(status, content, told)


def sign(file: File) -> str:
    """A signature, as long as those of the real store are."""
    return hashlib.sha256(f"signed {file.sha256}".encode()).hexdigest() * 8
