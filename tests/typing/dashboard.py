"""What a type checker sees of the dashboard. Checked, never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taskx import MemoryRepository, Queue
from taskx.programs.dashboard import ALL, Dashboard, serve

queue = Queue(MemoryRepository())


def permissions(environ: Mapping[str, Any]) -> set[str] | None:
    return {"read"} if environ.get("REMOTE_USER") else None


def make() -> None:
    Dashboard(queue, users={"ann": "secret"}, read_only=True, title="Shop")
    Dashboard(queue, permissions=permissions)
    Dashboard(queue, permissions=ALL)
    Dashboard(queue, permissions=["read", "cancel"])
    Dashboard("tasks.db")  # type: ignore[arg-type]
    Dashboard(queue, users=["ann"])  # type: ignore[arg-type]
    Dashboard(queue, permissions=3)  # type: ignore[arg-type]
    Dashboard(queue, readonly=True)  # type: ignore[call-arg]


def alone() -> None:
    serve(queue, "127.0.0.1", 0, users={"ann": "secret"}, ready=lambda url: None)
    serve(queue, permissions=permissions, read_only=True)
    serve(queue, allowed_hosts=["dash.example.org"], prefix="/taskx", behind_proxy=True)
    serve(queue, allowed_hosts=7)  # type: ignore[arg-type]
    serve(queue, port="80")  # type: ignore[arg-type]
