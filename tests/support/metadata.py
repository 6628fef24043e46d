"""A metadata server such as Google's, for tests of what it tells."""

import contextlib
import http.server
import threading


@contextlib.contextmanager
def serving(events):
    """Yields the address of a server that says one maintenance event after another, then the last.

    `events` may be changed meanwhile.
    """

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            said = "FALSE"
            if self.path.endswith("maintenance-event"):
                said = events.pop(0) if len(events) > 1 else events[0]
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
