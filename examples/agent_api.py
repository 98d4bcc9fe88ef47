"""Stands for what ``agent.py`` calls: a model that refuses every fifth call, tools, and a mail server.

python agent_api.py [PORT]
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: What the model was asked, and the mails by their keys: a key that is sent again is the same mail.
prompts: list[str] = []
mails: dict[str, str] = {}


class Api(BaseHTTPRequestHandler):
    """Answers one request."""

    def do_POST(self) -> None:
        """Let the model think about a prompt, or take a mail."""
        size = int(self.headers["Content-Length"])
        text = self.rfile.read(size).decode()
        if len(text.encode()) < size:  # the agent was killed
            return
        if self.path.startswith("/mails/"):
            mails[self.path.removeprefix("/mails/")] = text
            self._answer(200)
            return
        prompts.append(text)
        if len(prompts) % 5 == 0:
            self._answer(429, retry_after="0.2")
            return
        whose, document = text.partition(":")[0].split()[-2:]
        self._answer(200)
        with suppress(ConnectionError):  # the agent was killed
            for word in (
                [whose, document, "is", "fine"] if "letter" in text else ["prices", "dates"]
            ):
                time.sleep(0.05)
                self.wfile.write(f"{word}\n".encode())

    def do_GET(self) -> None:
        """Use a tool, or show the mails."""
        self._answer(200)
        self.wfile.write((json.dumps(mails) if self.path == "/mails" else self.path).encode())

    def _answer(self, status: int, retry_after: str = "") -> None:
        self.send_response(status)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Show no requests."""


class Server(ThreadingHTTPServer):
    """A server that lets many calls wait at once: Linux drops those beyond, and they come seconds later."""

    request_queue_size = 100


if __name__ == "__main__":
    Server(("127.0.0.1", int(*sys.argv[1:] or [8765])), Api).serve_forever()
