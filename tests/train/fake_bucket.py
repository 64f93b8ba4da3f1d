"""A bucket on this machine: what tensorstore (by HTTP) and fsspec see of gs://, over one dictionary.

Only what a checkpoint needs of the storage API: read a range, write, list, delete. `serve()` sets the environment that tensorstore
reads, registers the file system with fsspec, and must come before either is first used in a process.
"""

import json
import os
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

REQUESTS: list[str] = []  # what tensorstore has asked for
GENERATIONS: dict[str, int] = {}


class Bucket(MemoryFileSystem):
    """fsspec's memory under the name of Google's file system."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012

    def __init__(self, *args, finalize_on_close=True, **kwargs):
        super().__init__(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        for name in ("gs://", "gcs://"):
            path = path.removeprefix(name)
        return "/" + path.strip("/") if path.strip("/") else ""

    def exists(self, path, **kwargs):
        """As in a bucket: a directory is there when something is in it, or when it was made."""
        path = self._strip_protocol(path)
        return super().exists(path) or any(name.startswith(path + "/") for name in self.store)

    def rename(self, path, dst, recursive=False, **kwargs):
        return self.mv(path, dst, recursive=recursive)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body: bytes | dict = b"", generation=None, span=None):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        if span is not None:
            self.send_header("Content-Range", "bytes {}-{}/{}".format(*span))
        self.end_headers()
        self.wfile.write(body)

    def parsed(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = url.path.split("/b/", 1)[1].split("/o", 1)
        REQUESTS.append(f"{self.command} {url.path}")
        return parts[0], unquote(parts[1].lstrip("/")), query

    def do_GET(self):
        bucket, name, query = self.parsed()
        if not name:
            prefix = f"/{bucket}/{query.get('prefix', '')}"
            found = sorted(key for key in Bucket.store if key.startswith(prefix))
            return self.answer(200, {"items": [{"name": key.split("/", 2)[2]} for key in found]})
        file = Bucket.store.get(f"/{bucket}/{name}")
        if file is None:
            return self.answer(404)
        data, generation = file.getvalue(), GENERATIONS.get(f"/{bucket}/{name}", 1)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        wanted = self.headers.get("Range")
        if not wanted:
            return self.answer(200, data, generation)
        first, last = wanted.removeprefix("bytes=").split("-")
        first, last = (len(data) - int(last), len(data) - 1) if not first else (int(first), int(last) if last else len(data) - 1)
        last = min(last, len(data) - 1)
        return self.answer(206, data[first : last + 1], generation, (first, last, len(data)))

    def do_POST(self):
        bucket, _, query = self.parsed()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = f"/{bucket}/{query['name']}"
        if "ifGenerationMatch" in query and (GENERATIONS.get(key, 1) if key in Bucket.store else 0) != int(
            query["ifGenerationMatch"]
        ):
            return self.answer(412)
        Bucket.store[key] = MemoryFile(Bucket(), key, body)
        GENERATIONS[key] = GENERATIONS.get(key, 1) + 1
        return self.answer(200, {"name": query["name"], "generation": str(GENERATIONS[key]), "size": str(len(body))})

    def do_DELETE(self):
        bucket, name, _ = self.parsed()
        return self.answer(204 if Bucket.store.pop(f"/{bucket}/{name}", None) else 404)


def serve() -> ThreadingHTTPServer:
    """Starts the server."""
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://localhost:{server.server_address[1]}"
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    # Orbax asks Google's own client for one thing, before it deletes: whether the bucket has real folders
    flat = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: flat)  # pyright: ignore
    for name, module in (("google.cloud", types.ModuleType("google.cloud")), ("google.cloud.storage", storage)):
        sys.modules.setdefault(name, module)
    sys.modules["google.cloud"].storage = sys.modules["google.cloud.storage"]  # pyright: ignore
    return server
