"""A model hub on loopback, for the real `huggingface_hub` client.

`HubServer` answers the part of the Hub's HTTP protocol that `push_to_hub` and `from_pretrained` use: create a
repository, upload (preupload, LFS batch, PUT, commit), list, info, tree, and HEAD/GET of files. It knows model
repositories with one branch, `main`, and any token will do for writing.

A client must start with `HubServer.environment()` in its environment: the library reads it once, at import.

On disk, all under one folder (so that a test can look at what arrived, and a restarted server goes on where it was):

    blobs/<oid>                     contents; oid is git's SHA-1, or SHA-256 where the file is large or binary (LFS)
    repos/<owner>/<name>/main       the branch: the id of its newest commit
    repos/<owner>/<name>/<commit>   a commit: JSON, path -> {"size", "oid", "lfs"}
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import unquote, urlsplit

USER = "tester"  # who every token belongs to
LFS_THRESHOLD = 10_000_000  # bytes; smaller files with a NUL byte at their head go to LFS as well


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit. `oid` is the SHA-256 of its content where `lfs`, else git's SHA-1 of the blob."""

    size: int
    oid: str
    lfs: bool


class HubError(Exception):
    """An answer other than success; `code` is what the client tells one 404 from another by (`X-Error-Code`)."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubStore:
    """Repositories as plain files below `root`; the layout is in the module's docstring."""

    def __init__(self, root: Path) -> None:
        self.repos, self.blobs = root / "repos", root / "blobs"
        self.repos.mkdir(parents=True, exist_ok=True)
        self.blobs.mkdir(exist_ok=True)
        self.lock = threading.Lock()  # two commits at once must not both build on the same parent

    def list_repos(self) -> list[str]:
        return sorted(str(branch.parent.relative_to(self.repos)) for branch in self.repos.glob("*/*/main"))

    def create_repo(self, repo_id: str) -> None:
        folder = self.repos / repo_id
        if folder.exists():
            raise HubError(409, f"You already created this model repo: {repo_id}")
        folder.mkdir(parents=True)
        self._write_commit(folder, {}, parent="")

    def commit_id(self, repo_id: str, revision: str = "main") -> str:
        """The commit that `revision` (`main` or a commit's id) stands for; 404 for an unknown one."""
        folder = self.repos / repo_id
        if not folder.is_dir():
            raise HubError(404, "Repository not found", "RepoNotFound")
        if revision == "main":
            return (folder / "main").read_text()
        if re.fullmatch("[0-9a-f]{40}", revision) and (folder / revision).is_file():
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, StoredFile]:
        commit = json.loads((self.repos / repo_id / self.commit_id(repo_id, revision)).read_text())
        return {path: StoredFile(**entry) for path, entry in commit.items()}

    def content(self, file: StoredFile) -> bytes:
        return (self.blobs / file.oid).read_bytes()

    def put_lfs(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise HubError(400, f"the content's SHA-256 is not {oid}")
        (self.blobs / oid).write_bytes(data)

    def commit(self, repo_id: str, operations: list[dict]) -> str:
        """Apply the operations of one commit (lines of the ndjson body: `{"key": ..., "value": ...}`)."""
        with self.lock:
            files = self.files(repo_id)
            for operation in operations:
                key, value = operation["key"], operation["value"]
                if key == "file":
                    data = base64.b64decode(value["content"])
                    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                    (self.blobs / oid).write_bytes(data)
                    files[value["path"]] = StoredFile(len(data), oid, lfs=False)
                elif key == "lfsFile":
                    blob = self.blobs / value["oid"]
                    if not blob.is_file():
                        raise HubError(400, f"{value['path']}: LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = StoredFile(blob.stat().st_size, value["oid"], lfs=True)
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key != "header":
                    raise HubError(400, f"unknown operation {key!r}")
            return self._write_commit(self.repos / repo_id, files, parent=self.commit_id(repo_id))

    def _write_commit(self, folder: Path, files: dict[str, StoredFile], parent: str) -> str:
        text = json.dumps({path: asdict(file) for path, file in sorted(files.items())}, indent=1)
        commit_id = hashlib.sha1((parent + text).encode()).hexdigest()
        (folder / commit_id).write_text(text)
        (folder / "main").write_text(commit_id)
        return commit_id


class HubRequest(BaseHTTPRequestHandler):
    """One request. `routes` maps a method and a pattern of the path to what answers it."""

    store: HubStore
    log: list[str]
    protocol_version = "HTTP/1.1"

    def whoami(self) -> None:
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {}})

    def validate_yaml(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        try:
            self.store.create_repo(repo_id)
        except HubError as error:  # the client reads the repository's address from the refusal as well
            self.reply({"url": self.url(repo_id), "error": error.message}, status=error.status)
            return
        self.reply({"url": self.url(repo_id), "name": repo_id})

    def list_models(self) -> None:
        self.reply([{"id": repo_id, "modelId": repo_id} for repo_id in self.store.list_repos()])

    def model_info(self, repo_id: str, revision: str | None = None) -> None:
        commit_id = self.store.commit_id(repo_id, revision or "main")
        files = self.store.files(repo_id, commit_id)
        siblings = [{"rfilename": path} for path in files]
        self.reply({"id": repo_id, "modelId": repo_id, "sha": commit_id, "private": False, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        """All files below `folder`, as if `recursive` were always asked for."""
        prefix = f"{folder}/" if folder else ""
        files = {path: f for path, f in self.store.files(repo_id, revision).items() if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        entries = []
        for path, file in files.items():
            entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
            lfs = {"lfs": {"oid": file.oid, "size": file.size, "pointerSize": 134}} if file.lfs else {}
            entries.append(entry | lfs)
        self.reply(entries)

    def preupload(self, repo_id: str, revision: str) -> None:
        known = self.store.files(repo_id, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            lfs = file["size"] >= LFS_THRESHOLD or b"\0" in base64.b64decode(file["sample"])
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append(entry | ({"oid": known[file["path"]].oid} if file["path"] in known else {}))
        self.reply({"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        self.store.commit_id(repo_id)  # 404 where there is no such repository
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": self.url("lfs/" + item["oid"])}}
            stored = (self.store.blobs / item["oid"]).is_file()  # then there is nothing to upload
            objects.append({"oid": item["oid"], "size": item["size"]} | ({} if stored else {"actions": upload}))
        self.reply({"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, revision: str) -> None:
        if revision != "main":
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        operations = [json.loads(line) for line in self.body.splitlines()]
        commit_id = self.store.commit(repo_id, operations)
        self.reply({"success": True, "commitOid": commit_id, "commitUrl": self.url(f"{repo_id}/commit/{commit_id}")})

    def put_lfs(self, oid: str) -> None:
        self.store.put_lfs(oid, self.body)
        self.send(200, b"", {})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """A file's content. (The Hub redirects to its storage for LFS; here there is no second host for that.)"""
        commit_id = self.store.commit_id(repo_id, revision)
        headers = {"X-Repo-Commit": commit_id}
        file = self.store.files(repo_id, commit_id).get(path)
        if file is None:  # with the commit: the client remembers that this commit has no such file
            self.send(404, b"Entry not found", headers | {"X-Error-Code": "EntryNotFound"})
            return
        headers["ETag"] = f'"{file.oid}"'
        if file.lfs:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.size)}
        self.send(200, self.store.content(file), headers)

    routes: ClassVar[list[tuple[str, str, Callable[..., None]]]] = [
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", "/api/repos/create", create_repo),
        ("GET", "/api/models", list_models),
        ("GET", "/api/models/(REPO)", model_info),
        ("GET", "/api/models/(REPO)/revision/([^/]+)", model_info),
        ("GET", "/api/models/(REPO)/tree/([^/]+)(?:/(.+))?", tree),
        ("POST", "/api/models/(REPO)/preupload/([^/]+)", preupload),
        ("POST", "/api/models/(REPO)/commit/([^/]+)", commit),
        ("POST", "/(REPO)\\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", "/lfs/([0-9a-f]{64})", put_lfs),
        ("GET", "/(REPO)/resolve/([^/]+)/(.+)", resolve),
    ]

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.log.append(f"{self.command} {path}")
        self.body = self.read_body()  # also where no action looks at it: the next request follows on the same line
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for route_method, pattern, action in self.routes:
                found = re.fullmatch(pattern.replace("REPO", "[^/]+/[^/]+?"), path)
                if found and method == route_method:
                    # an upload's PUT carries no token: on the Hub its address is signed
                    if method == "POST" and not self.headers.get("Authorization", "").startswith("Bearer "):
                        raise HubError(401, "Invalid username or password.")
                    action(self, *(group and unquote(group) for group in found.groups()))
                    return
            raise HubError(404, f"this server does not answer {method} {path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.reply({"error": error.message}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal; `HubServer.log` has the requests."""


class HubServer:
    """The server, as a context manager: `with HubServer(folder) as hub: run(env=hub.environment(home))`."""

    def __init__(self, root: Path) -> None:
        self.store = HubStore(root)
        self.log: list[str] = []  # "GET /path", in order of arrival
        handler = type("Handler", (HubRequest,), {"store": self.store, "log": self.log})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """What a client's process needs; `home` is its cache, fresh for a client that has downloaded nothing."""
        # Xet is the Hub's newer upload protocol; without this the client asks for a token for it.
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
