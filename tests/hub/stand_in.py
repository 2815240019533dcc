"""A stand-in of the Hugging Face Hub on this machine: what its clients call, in memory.

A test can make it lie: ``list_with`` changes the answer that lists files, ``serve_with`` the answer
to a file.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"


@dataclass
class Answer:
    """status, headers and body of an answer; cut: end the connection after so many bytes."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None


@dataclass
class Commit:
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        content = [(k, hashlib.sha1(v).hexdigest()) for k, v in sorted(self.files.items())]
        return hashlib.sha1(repr(content).encode()).hexdigest()


@dataclass
class Repository:
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        new = Commit(dict(files))
        self.commits[new.sha] = new
        self.refs[branch] = new.sha
        return new.sha

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class StandIn:
    """``requests``: (method, path, authorization) of each request so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded large files by their SHA-256
        self.requests: list[tuple[str, str, str]] = []
        self.cards: list[str] = []  # that were given to be validated
        self.list_with: Callable[[dict[str, Any]], Any] = lambda listing: listing
        self.serve_with: Callable[[str, Answer], Answer] = lambda path, answer: answer
        self.closed = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                if outer.closed:  # a connection from before
                    self.close_connection = True
                    return
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                outer.requests.append(
                    (self.command, self.path, self.headers["Authorization"] or "")
                )
                answer = outer.answer(
                    self.command, self.path, {k.title(): v for k, v in self.headers.items()}, body
                )
                self.send_response(answer.status)
                headers = {"Content-Length": str(len(answer.body)), **answer.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.cut])
                if answer.cut is not None:
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closed = True
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """A commit of these files, or of a folder. Returns its hash."""
        if isinstance(files, Path):
            files = {
                p.relative_to(files).as_posix(): p.read_bytes()
                for p in files.rglob("*")
                if p.is_file()
            }
        return self.repositories.setdefault(name, Repository()).commit(files, branch)

    # --- answers -----------------------------------------------------------------------------

    def answer(self, method: str, address: str, headers: dict[str, str], body: bytes) -> Answer:
        url = urlsplit(address)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match method, parts:
            case "GET", ["api", "models", user, name, "revision", revision]:
                return self.listing(f"{user}/{name}", revision, parse_qs(url.query))
            case "GET", ["api", "models", user, name, "tree", revision]:
                return self.tree(f"{user}/{name}", revision)
            case "GET" | "HEAD", [user, name, "resolve", revision, *path]:
                return self.file(method, f"{user}/{name}", revision, "/".join(path), headers)
            case "GET", ["large", digest]:
                return self.content(address, self.blobs[digest], headers)
            case (("POST" | "PUT"), _) if (
                headers.get("Authorization") != f"Bearer {TOKEN}" and parts[0] != "large"
            ):
                return Answer(401, {"X-Error-Message": "Invalid credentials"}, b"{}")
            case "PUT", ["large", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                self.blobs[digest] = body
                return Answer()
            case "POST", [*_, "objects", "batch"]:
                return self.batch(json.loads(body))
            case "POST", ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                self.cards.append(json.loads(body)["content"])
                return self.json({"warnings": [], "errors": []})
            case "POST", ["api", "models", user, name, "branch", branch]:
                repository = self.repositories[f"{user}/{name}"]
                repository.refs.setdefault(branch, repository.refs["main"])
                return self.json({})
            case "POST", ["api", "models", _, _, "preupload", _]:
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if is_large(f["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for f in files
                ]
                return self.json({"files": modes})
            case "POST", ["api", "models", user, name, "commit", branch]:
                return self.commit(f"{user}/{name}", branch, body)
        return Answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")

    def json(self, value: object) -> Answer:
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _commit_at(self, name: str, revision: str) -> Commit | Answer:
        if name not in self.repositories:
            return Answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        commit = self.repositories[name].at(revision)
        return commit or Answer(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")

    def listing(self, name: str, revision: str, query: dict[str, list[str]]) -> Answer:
        commit = self._commit_at(name, revision)
        if isinstance(commit, Answer):
            return commit
        siblings: list[dict[str, Any]] = []
        for path, data in commit.files.items():
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in query:
                entry |= {"size": len(data), "blobId": git_hash(data)}
                if is_large(path):
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        answer = self.list_with({"id": name, "sha": commit.sha, "siblings": siblings})
        return answer if isinstance(answer, Answer) else self.json(answer)

    def tree(self, name: str, revision: str) -> Answer:
        commit = self._commit_at(name, revision)
        if isinstance(commit, Answer):
            return commit
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            for path, data in commit.files.items()
        ]
        return self.json(files)

    def file(
        self, method: str, name: str, revision: str, path: str, headers: dict[str, str]
    ) -> Answer:
        commit = self._commit_at(name, revision)
        if isinstance(commit, Answer):
            return commit
        if path not in commit.files:
            return self.serve_with(path, Answer(404, {"X-Error-Code": "EntryNotFound"}, b"{}"))
        data = commit.files[path]
        about = {"X-Repo-Commit": commit.sha}
        if is_large(path):
            digest = hashlib.sha256(data).hexdigest()
            self.blobs[digest] = data
            about |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            if method == "HEAD":  # a client that follows redirects on this host would lose these
                return Answer(200, about, data)
            about |= {"Location": f"/large/{digest}"}
            return self.serve_with(path, Answer(302, about))
        answer = self.content(path, data, headers)
        answer.headers |= about | {"ETag": f'"{git_hash(data)}"'}
        return answer

    def content(self, path: str, data: bytes, headers: dict[str, str]) -> Answer:
        start = headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        if start:
            total = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return self.serve_with(path, Answer(206, total, data[int(start) :]))
        return self.serve_with(path, Answer(200, {}, data))

    # --- uploads -----------------------------------------------------------------------------

    def create(self, asked: dict[str, Any]) -> Answer:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            answer = self.json({"url": f"{self.address}/{name}", "error": "it exists"})
            answer.status = 409
            return answer
        repository = self.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.json({"url": f"{self.address}/{name}", "name": name, "id": name})

    def batch(self, asked: dict[str, Any]) -> Answer:
        objects = [
            {
                **item,
                "actions": {
                    "upload": {"href": f"{self.address}/large/{item['oid']}", "header": {}}
                },
            }
            for item in asked["objects"]
        ]
        return self.json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, branch: str, body: bytes) -> Answer:
        repository = self.repositories[name]
        commit = repository.at(branch)
        assert commit is not None
        files = dict(commit.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, branch)
        url = f"{self.address}/{name}/commit/{sha}"
        return self.json({"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})


def cached(tmp_path: Path) -> list[Path]:
    """All files in the cache, also those that are being written."""
    return [path for path in (tmp_path / "cache").rglob("*") if not path.is_dir()]


def requested(hub: StandIn) -> list[str]:
    return [path for _, path, _ in hub.requests]
