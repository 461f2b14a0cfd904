"""A Hugging Face hub in a thread: serves folders as repositories, over the few routes that downloading needs."""
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


def entry(root: Path, path: Path) -> dict:
    "One file or folder as the hub describes it."
    data = path.read_bytes() if path.is_file() else b""
    kind = "file" if path.is_file() else "directory"
    return {"type": kind, "path": path.relative_to(root).as_posix(), "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def local_hub(repositories: dict):
    "Serve `{'models/distilgpt2': folder, 'datasets/owner/name': folder}`; yields the endpoint and the list of paths asked for."
    asked = []

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

        def missing(self, code):
            self.answer(b"{}", 404, X_Error_Code=code)

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(path)
            if not path:
                return self.answer(b"a hub")
            api = path.startswith("api/")
            rest = path[4:] if api else path if path.startswith("datasets/") else f"models/{path}"
            for name, folder in repositories.items():
                if rest == name or rest.startswith(name + "/"):
                    return self.repository(name, Path(folder), rest[len(name) + 1 :].split("/"), api, body)
            self.missing("RepoNotFound")

        def repository(self, name, folder, words, api, body):
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            if words[0] == "resolve":  # resolve/REVISION/FILE
                wanted = folder.joinpath(*words[2:])
                if wanted not in files:
                    return self.missing("EntryNotFound")
                data = wanted.read_bytes()
                start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
                return self.answer(data[start:], 206 if start else 200, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
            if not api:
                return self.missing("EntryNotFound")
            if words[0] == "tree":
                below = folder.joinpath(*words[2:])
                if not below.is_dir():
                    return self.missing("EntryNotFound")
                whole = "recursive=true" in self.path.lower()
                found = [entry(folder, path) for path in sorted(below.rglob("*") if whole else below.iterdir())]
            elif words[0] == "paths-info":
                wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
                found = [entry(folder, path) for path in files if path.relative_to(folder).as_posix() in wanted]
            else:  # the repository itself, perhaps at a revision
                siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
                found = {"id": name.split("/", 1)[1], "sha": REVISION, "siblings": siblings, "private": False, "tags": []}
            self.answer(json.dumps(found).encode(), Content_Type="application/json")

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
