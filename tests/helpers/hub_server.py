"""A Hub on loopback: repositories, uploads and downloads as huggingface_hub asks for them, all in memory.

Every request is recorded, and any can be made to fail. Uploads go by LFS: clients set HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


# Not of the form that real ones have, so that no scanner of secrets takes them for one.
TOKEN = "token-that-may-write-0123456789"
READ_TOKEN = "token-that-may-only-read-0123456789"
USER = "somebody"
BINARY = (".safetensors", ".bin", ".pt", ".pth", ".png")


@dataclass
class Repo:
    """One model on the Hub.

    Args:
        files: path -> content.
        commits: (message, the paths that it added), the oldest first.
    """

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """Of the last commit: other content, another name."""
        content = "".join(f"{path} {_oid(content, path)}\n" for path, content in sorted(self.files.items()))
        return hashlib.sha1(f"{len(self.commits)}\n{content}".encode()).hexdigest()


@dataclass
class Fault:
    """What happens to requests that `pattern` finds in "METHOD /path".

    Args:
        status: the answer; 0 cuts the connection after half of the body, and None lets the request through.
        times: how often.
        until: what to wait for before that.
    """

    pattern: str
    status: int | None
    times: float
    until: Callable[[], object] | None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    status: int
    body: bytes
    token: str | None


class HubServer:
    """`with HubServer() as hub`: serves at `hub.url` until the end of the block."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.errors: list[Fault] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, status: int | None = 503, times: float = float("inf"), until=None) -> None:
        """Add a `Fault`."""
        self.errors.append(Fault(pattern, status, times, until))

    def refuse(self) -> None:
        """From now on connections are refused, and those that are open lead nowhere."""
        self.fail("", status=0)
        self.__exit__()

    def asked(self, pattern: str) -> list[Request]:
        """The requests that `pattern` finds in "METHOD /path"."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which a program takes this for the Hub, and may write."""
        variables = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return variables | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def speak_to(url: str, set_attribute=setattr) -> None:
    """Make this process, which has imported huggingface_hub under other variables, take `url` for the Hub."""
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    set_attribute(constants, "ENDPOINT", url)
    set_attribute(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    set_attribute(constants, "HF_HUB_OFFLINE", False)
    set_attribute(constants, "HF_HUB_DISABLE_XET", True)
    set_attribute(huggingface_hub.hf_api.api, "endpoint", url)
    if hasattr(transformers.utils.hub, "_hf_api"):
        set_attribute(transformers.utils.hub, "_hf_api", None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        self.route = unquote(urlsplit(self.path).path)
        error_text = self._fault()
        if error_text and error_text.until:
            error_text.until()
        if error_text and error_text.status == 0:
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            self._record(0, b"")
            return self.connection.close()
        body = self._body()
        if error_text and error_text.status:
            return self._send((error_text.status, {"error": f"injected {error_text.status}"}), body)
        with self.hub.lock:
            answer = self._answer(body)
        self._send(answer, body)

    def _fault(self) -> Fault | None:
        for error_text in self.hub.errors:
            if error_text.times > 0 and re.search(error_text.pattern, f"{self.command} {self.route}"):
                error_text.times -= 1
                return error_text
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def _token(self) -> str | None:
        given = self.headers.get("Authorization", "")
        return given.removeprefix("Bearer ") or None

    def _record(self, status: int, body: bytes) -> None:
        self.hub.requests.append(Request(self.command, self.route, status, body, self._token))

    def _send(self, answer: tuple, body: bytes) -> None:
        status, content, headers = (*answer, {})[:3]
        # Before the client has its answer, and goes on to look at what is recorded.
        self._record(status, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, body: bytes):
        for method, pattern, name in _ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, self.route)):
                repo = self.hub.repos.get(match.groupdict().get("repo"))
                refusal = self._refusal(name, match.groupdict(), repo)
                return refusal or getattr(self, f"_{name}")(match.groupdict(), repo, body)
        return 404, {"error": "no such page"}

    def _refusal(self, name: str, found: dict, repo: Repo | None):
        if name in _WRITES:
            if self._token == READ_TOKEN:
                return 403, {"error": "You don't have the rights to create or change a model"}
            if self._token != TOKEN:
                return 401, {"error": "Invalid credentials in Authorization header"}
        hidden = repo is None or (repo.private and self._token not in (TOKEN, READ_TOKEN))
        if "repo" in found and hidden:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return None

    # Writing

    def _create(self, found, repo, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        known = name in self.hub.repos
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos.setdefault(name, Repo(private))
        return (409 if known else 200), {"url": f"{self.hub.url}/{name}", "id": name, "name": name}

    def _validate(self, found, repo, body):
        card = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.DOTALL)
        try:
            metadata = yaml.safe_load(card[1]) if card else {}
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        wrong = [] if isinstance(metadata, dict) else [{"message": "metadata is no mapping"}]
        return (400 if wrong else 200), {"errors": wrong, "warnings": []}

    def _preupload(self, found, repo, body):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(BINARY) else "regular",
                "shouldIgnore": False,
                "oid": _oid(repo.files[file["path"]], file["path"]) if file["path"] in repo.files else None,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def _batch(self, found, repo, body):
        verify = {"href": f"{self.hub.url}/lfs/verify"}
        objects = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": verify}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, found, repo, body):
        if hashlib.sha256(body).hexdigest() != found["oid"]:
            return 400, {"error": "the content is not what was announced"}
        self.hub.objects[found["oid"]] = body
        return 200, {}

    def _verify(self, found, repo, body):
        return (200 if json.loads(body)["oid"] in self.hub.objects else 404), {}

    def _commit(self, found, repo, body):
        message, added, files = "", [], dict(repo.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                continue
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                return 400, {"error": f"cannot commit {item['key']} {value}"}
            added.append(value["path"])
        repo.files = files
        repo.commits.append((message, added))
        return 200, {"commitUrl": f"{self.hub.url}/{found['repo']}/commit/{repo.sha}", "commitOid": repo.sha}

    # Reading

    def _info(self, found, repo, body):
        names = [{"rfilename": path} for path in sorted(repo.files)]
        about = {"id": found["repo"], "modelId": found["repo"], "private": repo.private, "tags": []}
        return 200, about | {"sha": repo.sha, "siblings": names}

    def _tree(self, found, repo, body):
        entries = []
        for path, content in sorted(repo.files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content, ".txt")}
            if path.endswith(BINARY):
                entry["lfs"] = {"oid": _oid(content, path), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return 200, entries

    def _resolve(self, found, repo, body):
        headers = {"X-Repo-Commit": repo.sha}
        if found["path"] not in repo.files:
            return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
        content = repo.files[found["path"]]
        return 200, content, headers | {"ETag": f'"{_oid(content, found["path"])}"'}


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("POST",), f"/api/models/{_REPO}/preupload/[^/]+", "preupload"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    (("POST",), "/lfs/verify", "verify"),
    (("POST",), f"/api/models/{_REPO}/commit/[^/]+", "commit"),
    (("GET",), f"/api/models/{_REPO}(/revision/[^/]+)?", "info"),
    (("GET",), f"/api/models/{_REPO}/tree/[^/]+.*", "tree"),
    (("GET", "HEAD"), f"/{_REPO}/resolve/[^/]+/(?P<path>.+)", "resolve"),
)
# The signature in its address is what an upload by LFS may be put in with: no token.
_WRITES = {"create", "preupload", "batch", "commit"}


def _oid(content: bytes, path: str) -> str:
    """As git names a file: sha256 of what LFS keeps, else sha1 of the blob."""
    if path.endswith(BINARY):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
