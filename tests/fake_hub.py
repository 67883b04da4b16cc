"""A miniature Hugging Face Hub on loopback, so that the Hub code paths run on a machine that cannot reach the real one.

    with FakeHub(root) as hub:
        subprocess.run([sys.executable, "flan-t5_samsum.py", "--model", "small"], env=hub.environment(cache_folder))
        assert "model.safetensors" in hub.downloads("google/flan-t5-small")

`root/models/<owner>/<name>/` and `root/datasets/<owner>/<name>/` hold the files of one repository each, with the single
branch `main`. The server knows the routes that huggingface_hub, transformers and datasets use for reading (what a real
repository answers on them is described at https://huggingface.co/docs/hub/api). Every request is kept in
`hub.requests`; what the server does not know gets a plain 404 and is also kept in `hub.unknown`.
"""

import hashlib
import json
import os
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

# Kept in Git LFS by the real Hub: their ETag is the SHA-256 of the content. Any other file has its git blob id.
LFS_SUFFIXES = {".bin", ".safetensors", ".parquet", ".model", ".h5", ".msgpack", ".npz", ".pt"}


class Request(NamedTuple):
    """One answered request: for example `Request("HEAD", "/google/flan-t5-small/resolve/main/config.json", 200)`."""

    method: str
    path: str  # with the query, as it came
    status: int


class RepositoryFile(NamedTuple):
    """What the Hub knows about one file of a repository."""

    path: Path
    size: int  # bytes
    git_id: str  # SHA-1, 40 hex digits
    sha256: str

    @property
    def in_lfs(self) -> bool:
        return self.path.suffix in LFS_SUFFIXES

    @property
    def etag(self) -> str:
        return self.sha256 if self.in_lfs else self.git_id


@cache
def _digests(path: Path, size: int, modified: int) -> tuple[str, str]:
    """git blob id and SHA-256 of a file. Size and time of change are arguments so that an edited file is read again."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest(), hashlib.sha256(content).hexdigest()


def repository_files(folder: Path) -> dict[str, RepositoryFile]:
    """All files below `folder`, by their name in the repository (forward slashes), sorted."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        digests = _digests(path, status.st_size, status.st_mtime_ns)
        files[path.relative_to(folder).as_posix()] = RepositoryFile(path, status.st_size, *digests)
    return files


def commit_of(files: dict[str, RepositoryFile]) -> str:
    """A commit hash (40 hex digits) that changes whenever a file does."""
    return hashlib.sha1(json.dumps([(name, file.git_id) for name, file in files.items()]).encode()).hexdigest()


def tree_entry(name: str, file: RepositoryFile | None) -> dict:
    """One row of the answers of /tree and /paths-info. A folder is a name without a file."""
    if file is None:
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    entry = {"type": "file", "path": name, "size": file.size, "oid": file.git_id}
    if file.in_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # clients keep the connection open, as with the real Hub
    server: "_Server"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def log_message(self, *_) -> None:
        """Requests are recorded in `FakeHub.requests`; the terminal belongs to pytest."""

    def _route(self) -> None:
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.silent:
            self._record(0)
            hub.closing.wait()  # the connection is open and no byte ever comes
            self.close_connection = True
            return
        # quoted slashes (revision refs%2Fpr%2F1) must not split a part: unquote after the split
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
                self._api(kind, f"{owner}/{name}", rest, body)
            case ["datasets", owner, name, "resolve", revision, *path] if path:
                self._file("datasets", f"{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path] if path:
                self._file("models", f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._unknown()

    def _repository(self, kind: str, repo_id: str, revision: str) -> tuple[dict[str, RepositoryFile], str] | None:
        """The repository's files and its commit, or None once the request has been answered with an error."""
        folder = self.server.hub.root / kind / repo_id
        if not folder.is_dir():
            return self._error("RepoNotFound", "Repository not found")
        files = repository_files(folder)
        commit = commit_of(files)
        if revision not in ("main", commit):
            return self._error("RevisionNotFound", f"Invalid rev id: {revision}")
        return files, commit

    def _api(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> None:
        """/api/models/<id>[/revision/<rev>], .../tree/<rev>[/<folder>] and .../paths-info/<rev>."""
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                endpoint, revision, folder = "info", (rest or ["", "main"])[1], ""
            case "GET", ["tree", revision, *path]:
                endpoint, folder = "tree", "/".join(path)
            case "POST", ["paths-info", revision]:
                endpoint, folder = "paths-info", ""
            case _:
                return self._unknown()
        repository = self._repository(kind, repo_id, revision)
        if repository is None:
            return None
        files, commit = repository
        folders = {parent.as_posix(): None for name in files for parent in Path(name).parents if parent != Path(".")}
        if endpoint == "info":
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": []}
            return self._json(info | {"siblings": siblings})
        if endpoint == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            found = folders | files
            return self._json([tree_entry(name, found[name]) for name in wanted if name in found])
        if folder and folder not in folders:
            return self._error("EntryNotFound", f"{folder} does not exist on {revision}", commit)
        query = parse_qs(urlsplit(self.path).query)
        below = folder + "/" if folder else ""
        rows = {name: file for name, file in sorted((folders | files).items()) if name.startswith(below)}
        if query.get("recursive", ["false"])[0].lower() != "true":
            rows = {name: file for name, file in rows.items() if "/" not in name[len(below) :]}
        return self._json([tree_entry(name, file) for name, file in rows.items()])

    def _file(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        """/<id>/resolve/<rev>/<path>: the content of one file, whole or the asked range of bytes."""
        repository = self._repository(kind, repo_id, revision)
        if repository is None:
            return
        files, commit = repository
        if name not in files:
            self._error("EntryNotFound", "Entry not found", commit)
            return
        file = files[name]
        content = file.path.read_bytes()
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.in_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        status = 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, file.size - int(last))
            stop = min(int(last) + 1, file.size) if first and last else file.size
            if start >= stop:
                self._answer(416, b"", {"Content-Range": f"bytes */{file.size}"})
                return
            content, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
        self._answer(status, content, headers)

    def _unknown(self) -> None:
        self.server.hub.unknown.append(Request(self.command, self.path, 404))
        self._answer(404, b'{"error": "the fake Hub has no such route"}')

    def _error(self, code: str, message: str, commit: str | None = None) -> None:
        # huggingface_hub chooses its exception by the code, and with the commit it remembers that a file is missing
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._answer(404, b"", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _record(self, status: int) -> None:
        self.server.hub.requests.append(Request(self.command, self.path, status))

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._record(status)
        self.send_response(status)
        for key, value in {"Content-Type": "application/octet-stream", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: "FakeHub"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a killed client is part of some tests
            super().handle_error(request, client_address)


class FakeHub:
    """Serves `root` on a free port of 127.0.0.1 from `__enter__` to `__exit__`.

    With `silent=True` it accepts every connection and never answers, like a Hub behind a broken firewall.
    """

    def __init__(self, root: str | Path, silent: bool = False):
        self.root = Path(root)
        self.silent = silent
        self.closing = threading.Event()
        self.requests: list[Request] = []
        self.unknown: list[Request] = []

    def __enter__(self) -> "FakeHub":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache_folder: str | Path, offline: bool = False) -> dict[str, str]:
        """The environment for a subprocess that talks to this Hub and to nothing else, with its own cache."""
        return environment(self.endpoint, cache_folder, offline)

    def downloads(self, repo_id: str) -> list[str]:
        """The files of a model (or data set) whose content was sent, each once per GET, in order."""
        prefixes = (f"/{repo_id}/resolve/", f"/datasets/{repo_id}/resolve/")
        sent = [urlsplit(path).path for method, path, status in self.requests if method == "GET" and status < 300]
        return [unquote(path.split("/resolve/")[1].partition("/")[2]) for path in sent if path.startswith(prefixes)]

    def forget(self) -> None:
        """Empty the records, for example between a first and a second run."""
        self.requests.clear()
        self.unknown.clear()


def environment(endpoint: str, cache_folder: str | Path, offline: bool = False) -> dict[str, str]:
    """This process's environment without its Hub settings, tokens and proxies, for an endpoint and a cache of its own.

    Only what isolates a test is set here. What a script needs to behave well (time-outs, no conversion of old
    checkpoints) is the script's own affair, so that a user gets it too.
    """
    settings = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "DATASETS_", "DISABLE_SAFETENSORS_CONVERSION")
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(settings) and not key.lower().endswith("_proxy")
    }
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(Path(cache_folder).resolve()),
        "HF_HUB_DISABLE_XET": "1",  # Xet fetches files from servers of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **({"HF_HUB_OFFLINE": "1"} if offline else {}),
    }
