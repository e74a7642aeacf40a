"""A small server that speaks the Hub's protocol on loopback, for huggingface_hub's real client.

Repositories are kept in memory: commits of files, each with a hash. What the client sends to create a repository, to
ask how files shall be uploaded, to upload large ones (LFS) and to commit is understood, and what it asks to download.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by id; each is a list of commits, the newest last, of files by path."""

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []

    def clear(self) -> None:
        """Begin anew."""
        for held in (self.commits, self.branches, self.large, self.requests):
            held.clear()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit's hash and files, by branch or hash."""
        wanted = self.branches.get((repo, revision), revision)
        return next((commit for commit in self.commits.get(repo, []) if commit[0] == wanted), None)

    def commit(self, repo: str, branch: str, lines: list[dict]) -> str:
        """Add files to a branch and return the new commit's hash."""
        parent = self.files(repo, branch)
        files = dict(parent[1]) if parent else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        digest = hashlib.sha1(repr((branch, sorted(files.items()), len(self.commits[repo]))).encode()).hexdigest()
        self.commits[repo].append((digest, files))
        self.branches[repo, branch] = digest
        return digest


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        content = self.body()
        for pattern, method in ROUTES.items():
            verb, _, shape = pattern.partition(" ")
            if verb == self.command and (match := re.fullmatch(shape, path)):
                return method(self, content, **match.groupdict())
        return self.answer(404, {"error": f"no route for {self.command} {path}"}, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, content: bytes) -> None:
        asked = json.loads(content)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        repo = repo if "/" in repo else f"someone/{repo}"
        self.hub.commits.setdefault(repo, [])
        if (repo, "main") not in self.hub.branches:
            self.hub.commit(repo, "main", [])
        self.answer(200, {"url": f"http://{self.headers['Host']}/{repo}", "id": repo})

    def who(self, content: bytes) -> None:
        self.answer(200, {"type": "user", "name": "someone", "orgs": []})

    def validate(self, content: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, content: bytes, repo: str, revision: str) -> None:
        self.hub.branches[repo, revision] = self.hub.branches[repo, "main"]
        self.answer(200, {})

    def preupload(self, content: bytes, repo: str, revision: str) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(content)["files"]
        ]
        self.answer(200, {"files": modes})

    def lfs_batch(self, content: bytes, repo: str) -> None:
        asked = json.loads(content)
        base = f"http://{self.headers['Host']}/lfs"
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{base}/{each['oid']}", "header": {}}},
            }
            for each in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def lfs_upload(self, content: bytes, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "hash"})
        self.hub.large[oid] = content
        return self.answer(200)

    def commit(self, content: bytes, repo: str, revision: str) -> None:
        digest = self.hub.commit(repo, revision, [json.loads(line) for line in content.splitlines() if line])
        url = f"http://{self.headers['Host']}/{repo}/commit/{digest}"
        self.answer(200, {"success": True, "commitOid": digest, "commitUrl": url, "hookOutput": ""})

    def info(self, content: bytes, repo: str, revision: str = "main") -> None:
        found = self.hub.files(repo, revision)
        if found is None:
            return self.answer(404, {"error": "none"}, X_Error_Code="RevisionNotFound")
        digest, files = found
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, {"id": repo, "modelId": repo, "sha": digest, "siblings": siblings, "tags": []})

    def resolve(self, content: bytes, repo: str, revision: str, name: str) -> None:
        found = self.hub.files(repo, revision)
        if found is None:
            return self.answer(404, {"error": "none"}, X_Error_Code="RevisionNotFound")
        digest, files = found
        if name not in files:
            return self.answer(404, {"error": "none"}, X_Error_Code="EntryNotFound", X_Repo_Commit=digest)
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return self.answer(200, files[name], ETag=etag, X_Repo_Commit=digest, Accept_Ranges="bytes")


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[\w.-]+)"
ROUTES = {
    "POST /api/repos/create": _Handler.create,
    "GET /api/whoami-v2": _Handler.who,
    "POST /api/validate-yaml": _Handler.validate,
    rf"POST /api/models/{REPO}/branch/{REVISION}": _Handler.branch,
    rf"POST /api/models/{REPO}/preupload/{REVISION}": _Handler.preupload,
    rf"POST /api/models/{REPO}/commit/{REVISION}": _Handler.commit,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    r"PUT /lfs/(?P<oid>\w+)": _Handler.lfs_upload,
    rf"GET /api/models/{REPO}/revision/{REVISION}": _Handler.info,
    rf"GET /api/models/{REPO}": _Handler.info,
    rf"HEAD /{REPO}/resolve/{REVISION}/(?P<name>.+)": _Handler.resolve,
    rf"GET /{REPO}/resolve/{REVISION}/(?P<name>.+)": _Handler.resolve,
}


def serve() -> tuple[ThreadingHTTPServer, Hub]:
    """A running server on a free port, and what it holds."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, hub


if __name__ == "__main__":  # on its own, to try a client against it
    running, _ = serve()
    print(f"HF_ENDPOINT=http://127.0.0.1:{running.server_address[1]}", flush=True)
    threading.Event().wait()
