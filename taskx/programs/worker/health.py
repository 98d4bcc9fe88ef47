"""The health of a supervisor for machines: a file that exists while all is well, and a port for HTTP."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from taskx.tasks.errors import ConfigurationError
from taskx.tasks.timing import DEFAULT_TIMING, Timing

# The values of a report by the paths that answer with them.
_KEYS = {"/health": "ok", "/live": "live", "/ready": "ready"}
#: A report: JSON values, with ``ok``, ``live`` and ``ready``.
Report = dict[str, Any]


class HealthFile:
    """A file that exists, and is written every few seconds, while all is well."""

    def __init__(self, path: str, timing: Timing = DEFAULT_TIMING) -> None:
        self._every = timing.health_every
        self._path = os.path.abspath(path)
        self._write_at = 0.0
        self._remove()  # one that was left by a supervisor that was killed
        try:
            self._write({"ok": False})
        except OSError as error:
            raise ConfigurationError(
                f"the health file {path} cannot be written: {error.strerror}"
            ) from error
        self._remove()

    def show(self, report: Report, now: float) -> None:
        """Write the report if it is good, and the time has come; else remove the file."""
        if not (report["ok"] and report["ready"]):
            self.close()
        elif now >= self._write_at:
            self._write_at = now + self._every
            with suppress(OSError):  # the disk is full: the file gets old, as it should
                self._write(report)

    def _write(self, report: Report) -> None:
        new = f"{self._path}.{os.getpid()}.new"
        with open(new, "w") as file:
            json.dump(report, file)
            file.write("\n")
        os.replace(new, self._path)

    def close(self) -> None:
        """Remove the file."""
        self._write_at = 0.0
        self._remove()

    def _remove(self) -> None:
        with suppress(OSError):
            os.unlink(self._path)


class HealthPort:
    """Answers ``GET /health``, ``/live`` and ``/ready`` with 200 or 503, and the report as JSON."""

    def __init__(
        self,
        host: str,
        port: int,
        report: Callable[[], tuple[Report, float]],
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        facts = {
            "report": staticmethod(report),
            "timeout": timing.probe_within,
            "report_within": timing.report_within,
        }
        handler = type("Handler", (_Handler,), facts)
        try:
            self._server = _Server((host, port), handler)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"cannot listen on {host} port {port}: {error}") from error
        #: The address as text.
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="taskx-health", daemon=True
        ).start()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # connections that wait: probes come in bursts

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


class _Handler(BaseHTTPRequestHandler):
    timeout = DEFAULT_TIMING.probe_within
    report_within = DEFAULT_TIMING.report_within
    server_version = "taskx"
    sys_version = ""
    report: Callable[[], tuple[Report, float]]

    def do_GET(self) -> None:
        report, at = self.report()
        key = _KEYS.get(self.path.partition("?")[0])
        if key is None:
            self._answer(404, {"error": f"use {', '.join(_KEYS)}"})
        elif time.monotonic() - at > self.report_within:
            self._answer(503, {**report, key: False, "error": "the supervisor hangs"})
        else:
            self._answer(200 if report[key] else 503, report)

    do_HEAD = do_GET  # noqa: N815  (the name is that of the base class)

    def _answer(self, status: int, report: Report) -> None:
        body = json.dumps(report).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes come every few seconds."""
