"""The examination of a MongoDB server: its answer, its kind and its clock. It changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from taskx.stores.mongo.connection import Connection, words_of
from taskx.stores.mongo.documents import moment_ms
from taskx.tasks.clock import Clock
from taskx.tasks.errors import RepositoryError
from taskx.tasks.findings import Check, fail, ok, warn

# Milliseconds by which the server's clock may differ, besides the time of the answer.
_TOLERANCE = 2000


def _words(error: RepositoryError) -> str:
    cause = error.__cause__
    return words_of(cause) if isinstance(cause, Exception) else str(error)


def examine(connection: Connection, clock: Clock) -> Iterator[Check]:
    """Yield what is right and wrong with the server of a connection."""
    began, before = time.monotonic(), clock.now_ms()
    try:
        told: dict[str, Any] = connection.run(
            lambda: connection.tasks.database.client.admin.command("hello"),
            connection.timing.answer_within,
        )
    except RepositoryError as error:
        yield fail(
            "server",
            f"The server does not answer: {_words(error)}.",
            "Check the URL, the network and the server.",
        )
        return
    took = (time.monotonic() - began) * 1000
    kind = _kind(told)
    yield ok("server", f"The {kind} has answered in {took:.0f} ms.", kind=kind, ms=took)
    if not told.get("isWritablePrimary", told.get("ismaster", True)):
        yield warn(
            "primary", "The server is not a primary.", "Wait for an election, or check the set."
        )
    theirs = moment_ms(told.get("localTime"))
    if theirs is not None and not before - _TOLERANCE <= theirs <= before + took + _TOLERANCE:
        yield warn(
            "server clock",
            f"The server's clock differs by {abs(theirs - before) / 1000:.0f} s from this machine's.",
            "Synchronize the clocks, for example with chrony: delays and schedules depend on them.",
            seconds=(theirs - before) / 1000,
        )
    elif theirs is not None:
        yield ok("server clock", "The server's clock agrees with this machine's.")


def _kind(told: dict[str, Any]) -> str:
    if "setName" in told:
        return "replica set"
    return "sharded cluster" if told.get("msg") == "isdbgrid" else "standalone server"
