"""A web server on this machine for tests of downloads, with whatever goes wrong on the way chosen beforehand."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Site:
    """Serves the files of a folder; `requests` has path and Range header of every request.

    folder: what is served; changing it changes the site.
    break_after: bytes of the next answers' bodies after which the connection is cut, one number an answer.
    statuses: HTTP statuses of the next answers.
    ranges: False: the Range header is not understood, as with some servers.
    """

    def __init__(self, folder: Path):
        self.folder, self.requests = folder, []
        self.break_after: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True
        self.url = ""


@contextmanager
def served(folder: Path):
    site = Site(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.requests.append((self.path, self.headers.get("Range")))
            if site.statuses:
                return self.send_error(site.statuses.pop(0))
            path = site.folder / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            content, start = path.read_bytes(), 0
            asked = self.headers.get("Range") if site.ranges else None
            if asked:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[: site.break_after.pop(0)] if site.break_after else body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
