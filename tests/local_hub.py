"""A Hugging Face hub in a thread: serves folders as repositories and takes new ones, over the few routes that down- and uploading need."""
import base64
import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    commits: dict  # commit → folder, newest last
    private: bool = False
    tags: dict = field(default_factory=dict)  # name → commit

    def find(self, revision: str) -> str | None:
        "The commit that is meant."
        commit = list(self.commits)[-1] if revision == "main" else self.tags.get(revision, revision)
        return commit if commit in self.commits else None


def entry(root: Path, path: Path) -> dict:
    "One file or folder as the hub describes it."
    data = path.read_bytes() if path.is_file() else b""
    kind = "file" if path.is_file() else "directory"
    return {"type": kind, "path": path.relative_to(root).as_posix(), "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def described(name: str, folder: Path, commit: str, words: list, whole: bool, body: bytes):
    "What the hub's interface says about a commit; None for a folder that is not there."
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if words[0] == "tree":  # tree/REVISION/FOLDER
        below = folder.joinpath(*words[2:])
        return [entry(folder, path) for path in sorted(below.rglob("*") if whole else below.iterdir())] if below.is_dir() else None
    if words[0] == "paths-info":
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
        return [entry(folder, path) for path in files if path.relative_to(folder).as_posix() in wanted]
    siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
    return {"id": name.split("/", 1)[1], "sha": commit, "siblings": siblings, "private": False, "tags": []}


def commit_to(repository: Repository, body: bytes, folder: Path) -> str:
    "Make a new commit out of the last one and lines of JSON; its folder is made inside `folder`."
    commit = hashlib.sha1(f"{folder} {len(repository.commits)}".encode()).hexdigest()
    shutil.copytree(repository.commits[repository.find("main")], folder / commit)
    for line in body.splitlines():
        do, value = (json.loads(line)[key] for key in ("key", "value"))
        path = folder / commit / value.get("path", "")
        if do == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(value["content"]))
        elif do == "deletedFile":
            path.unlink()
        elif do != "header":
            raise ValueError(f"this hub cannot do {do}")
    repository.commits[commit] = folder / commit
    return commit


@contextmanager
def local_hub(repositories: dict, uploads: Path | None = None):
    """Serve `{'models/distilgpt2': folder, 'datasets/owner/name': folder}`; yields the endpoint and the list of paths asked for.
    With a folder for uploads, whoever sends a token may create repositories of models and commit to them; private ones are then read with a token only."""
    asked = []
    held = {name: Repository({REVISION: Path(folder)}) for name, folder in repositories.items()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, body=b"", status=200, **headers):
            headers = {"Content-Length": str(len(body)), "X-Repo-Commit": REVISION, **{key.replace("_", "-"): value for key, value in headers.items()}}
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def say(self, found, status=200):
            self.answer(json.dumps(found).encode(), status, Content_Type="application/json")

        def missing(self, code):
            self.answer(b"{}", 404, X_Error_Code=code)

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            words = [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]
            path = "/".join(words)
            asked.append(path)
            if not path:
                return self.answer(b"a hub")
            if path == "api/validate-yaml":
                return self.say({"errors": [], "warnings": []})
            if path == "api/repos/create":
                return self.create(json.loads(body))
            api = words[0] == "api"
            rest = words[1:] if api else words if words[0] == "datasets" else ["models", *words]
            for name, repository in held.items():
                length = name.count("/") + 1
                if "/".join(rest[:length]) == name:
                    if repository.private and not self.headers.get("Authorization"):
                        return self.say({"error": "Invalid username or password."}, 401)
                    return self.repository(name, repository, rest[length:] or ["revision", "main"], api, body)
            self.missing("RepoNotFound")

        def repository(self, name, repository, words, api, body):
            commit = repository.find(words[1]) if len(words) > 1 else None
            if commit is None:
                return self.missing("RevisionNotFound")
            folder = repository.commits[commit]
            if words[0] == "resolve":  # resolve/REVISION/FILE
                wanted = folder.joinpath(*words[2:])
                if not wanted.is_file():
                    return self.missing("EntryNotFound")
                data = wanted.read_bytes()
                start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
                return self.answer(data[start:], 206 if start else 200, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)
            if api and words[0] in ("preupload", "commit", "tag"):
                return self.change(name, repository, words[0], commit, body)
            found = described(name, folder, commit, words, "recursive=true" in self.path.lower(), body) if api else None
            return self.missing("EntryNotFound") if found is None else self.say(found)

        def may_write(self):
            if uploads is None or not self.headers.get("Authorization"):
                self.say({"error": "Invalid username or password."}, 401)
                return False
            return True

        def create(self, wanted):
            name = f"models/{wanted['organization']}/{wanted['name']}"
            if not self.may_write():
                return None
            url = {"url": f"http://{self.headers['Host']}/{name.removeprefix('models/')}"}
            if name in held:
                return self.say({"error": "You already created this model repo", **url}, 409)
            first = Path(uploads) / name / "first"
            first.mkdir(parents=True)
            (first / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            held[name] = Repository({hashlib.sha1(name.encode()).hexdigest(): first}, wanted.get("visibility") == "private" or wanted.get("private", False))
            self.say(url)

        def change(self, name, repository, what, commit, body):
            if not self.may_write():
                return None
            if what == "tag":
                repository.tags[json.loads(body)["tag"]] = commit
                return self.say({})
            if what == "preupload":  # small files: as they are
                return self.say({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]})
            commit = commit_to(repository, body, Path(uploads) / name)
            self.say({"success": True, "commitOid": commit, "commitUrl": f"http://{self.headers['Host']}/{name.removeprefix('models/')}/commit/{commit}"})

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
