"""A simulated Google metadata server that announces maintenance events."""

import contextlib
import http.server
import threading


@contextlib.contextmanager
def serving(events):
    """Yields the address of a server that answers with each of the events in turn, then the last.

    `events` may change while the server runs.
    """

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = "FALSE"
            if self.path.endswith("maintenance-event"):
                answer = events.pop(0) if len(events) > 1 else events[0]
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, format, *args):
            pass

    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
