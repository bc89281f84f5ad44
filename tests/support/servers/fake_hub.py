"""A Hugging Face hub on this machine: the part of its protocol that downloads use, with faults to order.

Two servers, as in reality: the hub answers questions and redirects to a second host, which gives the contents.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def commit_of(name):
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class FakeRepo:
    """files of each commit; refs name commits. With a token, only requests that bring it are answered."""

    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def commit(self, files, ref="main"):
        """A new commit with these files (path → bytes), at which ref is from now on; returns its name."""
        name = commit_of(f"{len(self.commits)} {sorted(files)}")
        self.commits[name] = dict(files)
        self.refs[ref] = name
        return name


@dataclass
class Request:
    server: str
    method: str
    path: str
    headers: dict

    @property
    def begin(self):
        """The first byte asked for."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else 0


class FakeHub:
    """Attributes set by tests:

    repos: OWNER/REPO → FakeRepo.
    answers: regular expression of a path → (status, headers, body), given instead of the true answer.
    listed: path → changes of what the listing says of a file (size, sha256, rfilename).
    contents: path → bytes that the second host gives instead of the true ones.
    break_after: path → list; each request for its content takes an entry, and the connection is closed after so many
        bytes (None: not at all).
    ignores_range: paths of which the second host always gives all.
    stall_after: path → bytes after which it gives no more until `go_on` is set.
    """

    def __init__(self):
        self.repos, self.answers, self.listed, self.contents = {}, {}, {}, {}
        self.break_after, self.ignores_range, self.stall_after = {}, set(), {}
        self.go_on, self.stalled = threading.Event(), threading.Event()
        self.requests = []
        self.hub = self._server(_Hub, "hub")
        self.cdn = self._server(_Cdn, "cdn")
        # Another name of the same machine: what a client must not send to another host, it must not send there.
        self.address = f"http://127.0.0.1:{self.hub.server_port}"
        self.cdn_address = f"http://localhost:{self.cdn.server_port}"

    def _server(self, handler, name):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.fake, server.name = self, name
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def repo(self, name="owner/model-GGUF", files=None, **settings):
        self.repos[name] = repo = FakeRepo(**settings)
        if files is not None:
            repo.commit(files)
        return repo

    def contents_asked(self, path=""):
        """Requests for contents, with where they began."""
        return [(r.path.split("/", 3)[-1], r.begin) for r in self.requests if r.server == "cdn" and path in r.path]

    def close(self):
        self.go_on.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()


@contextmanager
def fake_hub():
    hub = FakeHub()
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    def do_HEAD(self):
        self._serve()

    def _serve(self):
        self.fake = self.server.fake
        self.query, self.path = urlsplit(self.path).query, unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.fake.requests.append(Request(self.server.name, self.command, self.path, headers))
        for pattern, answer in self.fake.answers.items():
            if re.search(pattern, f"{self.server.name} {self.command} {self.path}"):
                self._answer(*answer)
                return
        self._true_answer()

    def _answer(self, status, headers=None, body=b""):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Hub(_Handler):
    def _true_answer(self):
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repo = self.fake.repos.get((api or file)[1]) if api or file else None
        allowed = repo is not None and (
            repo.token is None or self.headers.get("Authorization") == f"Bearer {repo.token}"
        )
        if repo is None or (not allowed and not repo.gated):
            self._answer(401, {"X-Error-Code": "RepoNotFound"}, b"")
            return
        revision = ((api or file)[2]) or "main"
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
            return
        files = repo.commits[commit]
        if api:
            siblings = [self._entry(path, data) for path, data in files.items()]
            self._answer(200, {"Content-Type": "application/json"}, {"id": api[1], "sha": commit, "siblings": siblings})
            return
        if not allowed:
            self._answer(403, {"X-Error-Code": "GatedRepo"}, b"")
            return
        if file[3] not in files:
            self._answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        data = files[file[3]]
        digest = hashlib.sha256(data).hexdigest()
        self._answer(
            302,
            {
                "Location": f"{self.fake.cdn_address}/{file[1]}/{file[3]}?digest={digest}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": len(data),
                "X-Linked-Etag": f'"{digest}"',
                "ETag": f'"{commit_of(file[3])}"',
            },
        )

    def _entry(self, path, data):
        changes = self.fake.listed.get(path, {})
        size = changes.get("size", len(data))
        sha256 = changes.get("sha256", hashlib.sha256(data).hexdigest())
        return {
            "rfilename": changes.get("rfilename", path),
            "size": size,
            "blobId": commit_of(path),
            "lfs": {"sha256": sha256, "size": size, "pointerSize": 134},
        }


class _Cdn(_Handler):
    def _true_answer(self):
        fake = self.fake
        repo, path = re.fullmatch(r"/([^/]+/[^/]+)/(.+)", self.path).groups()
        data = fake.contents.get(path)
        if data is None:
            versions = [files[path] for files in fake.repos[repo].commits.values() if path in files]
            data = next(data for data in versions if hashlib.sha256(data).hexdigest() in self.query)
        begin = 0 if path in fake.ignores_range else fake.requests[-1].begin
        if begin >= len(data):
            self._answer(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        breaks = fake.break_after.get(path)
        end = breaks.pop(0) if breaks else None
        stall = fake.stall_after.get(path)
        try:
            if stall is not None and not fake.go_on.is_set():
                self.wfile.write(data[begin:stall])
                self.wfile.flush()
                fake.stalled.set()
                fake.go_on.wait()
                begin = max(begin, stall)
            self.wfile.write(data[begin:] if end is None else data[begin : begin + end])
        except OSError:  # the client is gone
            end = 0
        if end is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.close()
