"""A small Google Cloud Storage server on this machine, for tests with the real client libraries.

TensorFlow's client uses it as a proxy, which answers as "storage.googleapis.com" with a new
certificate. TensorStore's client gets its address. Objects are kept in memory.
"""

import contextlib
import http.server
import itertools
import json
import pathlib
import re
import ssl
import subprocess
import threading
import urllib.parse

_MEDIA = "application/octet-stream"


class Bucket:
    """The objects of gs://bucket, and a log of requests."""

    name = "bucket"

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}  # name -> bytes, generation
        self.log: list[tuple[str, str, str, int]] = []  # method, object or prefix, range, bytes
        self.lock = threading.RLock()
        self._generation = itertools.count(1)

    def __getitem__(self, name):
        return self.objects[name][0]

    def put(self, name, content):
        """Writes an object and returns its generation."""
        with self.lock:
            generation = next(self._generation)
            self.objects[name] = bytes(content), generation
            return generation

    def upload(self, folder, prefix):
        """Copies the files of a folder."""
        for path in sorted(pathlib.Path(folder).rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def below(self, prefix):
        """Maps names, without the prefix, to bytes, for all objects below it but folder markers."""
        with self.lock:
            objects = {name: content for name, (content, _) in self.objects.items()}
        prefix = prefix.rstrip("/") + "/"
        return {
            name.removeprefix(prefix): content
            for name, content in sorted(objects.items())
            if name.startswith(prefix) and not name.endswith("/")
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    bucket: Bucket
    context: ssl.SSLContext
    sessions: dict[str, tuple[str, dict[str, str], bytearray]]

    def log_message(self, format, *args):
        pass

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection = self.context.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)
        self.close_connection = False

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()
        self.connection.close()

    def _dispatch(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.body = self._body()
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and method == self.command:
                names = [urllib.parse.unquote(part) for part in found.groups()]
                if names and names[0] == "forbidden":
                    return self._fail(403)
                if names and names[0] != self.bucket.name and method != "PUT":
                    return self._fail(404)
                return answer(self, *names)
        return self._fail(501)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_PUT = do_POST = do_DELETE = _dispatch

    def _send(self, status, content=b"", kind=_MEDIA, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), "application/json")

    def _fail(self, status):
        message = {"error": {"code": status, "message": http.HTTPStatus(status).phrase}}
        self._send(status, json.dumps(message).encode(), "application/json")

    def _log_request(self, name, content=b""):
        asked = self.headers.get("Range", "")
        self.bucket.log.append((self.command, name, asked, len(content)))

    def _describe(self, name):
        content, generation = self.bucket.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.bucket.name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _generation_matches(self, name):
        """Whether the object has the generation that the request requires, if any."""
        _, generation = self.bucket.objects.get(name, (b"", 0))
        wanted = self.query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == generation

    def bucket_get(self, _):
        self._json({"kind": "storage#bucket", "name": self.bucket.name, "location": "EUROPE"})

    def layout(self, _):
        self._json({"kind": "storage#storageLayout", "hierarchicalNamespace": {"enabled": False}})

    def list(self, _):
        query = self.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        most, items, prefixes = int(query.get("maxResults", 1000)), [], []
        entry, answer = "", {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        self._log_request(prefix)
        with self.bucket.lock:
            for name in sorted(self.bucket.objects):
                if not name.startswith(prefix) or name < first or (end and name >= end):
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                before, entry = entry, prefix + head + delimiter if found else name
                if entry <= query.get("pageToken", "") or entry == before:
                    continue
                if len(items) + len(prefixes) == most:
                    answer["nextPageToken"] = before
                    break
                if found:
                    prefixes.append(entry)
                else:
                    items.append(self._describe(name))
        self._json({name: value for name, value in answer.items() if value})

    def get(self, _, name):
        with self.bucket.lock:
            if name not in self.bucket.objects:
                return self._fail(404)
            content, generation = self.bucket.objects[name]
            described = self._describe(name)
        if self.path.startswith("/storage/v1/") and self.query.get("alt") != "media":
            return self._json(described)
        if not self._generation_matches(name):
            return self._fail(412)
        if str(generation) == self.query.get("ifGenerationNotMatch"):
            return self._send(304)  # a body would break the next response on the connection
        headers = {"X_Goog_Generation": generation, "ETag": f'"{generation}"'}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._log_request(name, content)
            return self._send(200, content, **headers)
        size = len(content)
        begin = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
        if begin >= size:
            return self._fail(416)
        part = content[begin:end]
        self._log_request(name, part)
        self._send(206, part, Content_Range=f"bytes {begin}-{end - 1}/{size}", **headers)

    def delete(self, _, name):
        with self.bucket.lock:
            self._log_request(name)
            if name not in self.bucket.objects:
                return self._fail(404)
            if not self._generation_matches(name):
                return self._fail(412)
            del self.bucket.objects[name]
        self._send(204)

    def upload(self, _):
        kind, name, content = self.query["uploadType"], self.query.get("name", ""), self.body
        if kind == "resumable":
            name = name or json.loads(self.body)["name"]
            session = f"s{len(self.sessions)}"
            self.sessions[session] = name, self.query, bytearray()
            host = "https://www.googleapis.com"
            return self._send(200, Location=f"{host}/upload/session/{session}")
        if kind == "multipart":
            boundary = re.findall(r'boundary="?([^";]+)', self.headers["Content-Type"])[0].encode()
            described, media = self.body.split(b"--" + boundary)[1:3]
            name = name or json.loads(described.partition(b"\r\n\r\n")[2])["name"]
            content = media.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        self._store(name, content)

    def _store(self, name, content):
        with self.bucket.lock:
            if not self._generation_matches(name):
                return self._fail(412)
            self._log_request(name, content)
            self.bucket.put(name, content)
            self._json(self._describe(name))

    def session(self, session):
        if session not in self.sessions:
            return self._fail(410)
        name, self.query, received = self.sessions[session]
        span = self.headers.get("Content-Range", "bytes */0")  # absent for an empty object
        asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", span)
        assert asked, span
        if asked[1] is not None and int(asked[1]) == len(received):
            received += self.body
        if asked[3] == "*" or len(received) < int(asked[3]):
            return self._send(
                308, b"", **({"Range": f"bytes=0-{len(received) - 1}"} if received else {})
            )
        self._store(name, received)

    def rewrite(self, _, name, __, target):
        with self.bucket.lock:
            if name not in self.bucket.objects:
                return self._fail(404)
            self._log_request(target)
            self.bucket.put(target, self.bucket[name])
            self._json(
                {
                    "kind": "storage#rewriteResponse",
                    "done": True,
                    "resource": self._describe(target),
                }
            )


_OBJECTS = r"/storage/v1/b/([^/]+)/o"
_ROUTES = (
    ("GET", r"/storage/v1/b/([^/]+)", _Handler.bucket_get),
    ("GET", r"/storage/v1/b/([^/]+)/storageLayout", _Handler.layout),
    ("GET", _OBJECTS, _Handler.list),
    ("GET", _OBJECTS + r"/([^/]+)", _Handler.get),
    ("DELETE", _OBJECTS + r"/([^/]+)", _Handler.delete),
    ("POST", r"/upload/storage/v1/b/([^/]+)/o", _Handler.upload),
    ("PUT", r"/upload/session/([^/]+)", _Handler.session),
    ("POST", _OBJECTS + r"/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", _Handler.rewrite),
    ("GET", r"/([^/]+)/(.+)", _Handler.get),  # TensorFlow reads through the XML API
)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass  # killed clients leave unfinished requests


@contextlib.contextmanager
def serve(folder):
    """Serves an empty bucket.

    Args:
      folder: where the certificate is written.

    Yields:
      The Bucket, and the environment variables that point clients to it.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        + ["-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=fake"]
        + ["-addext", "subjectAltName=DNS:storage.googleapis.com,DNS:www.googleapis.com"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    bucket = Bucket()
    values = {"bucket": bucket, "context": context, "sessions": {}}
    server = _Server(("localhost", 0), type("Handler", (_Handler,), values))
    address = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield (
            bucket,
            {
                "https_proxy": address,
                "CURL_CA_BUNDLE": str(certificate),
                "NO_GCE_CHECK": "true",
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",
            },
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
